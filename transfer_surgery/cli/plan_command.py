"""``transfer-surgery plan``: what would be converted, and how."""

from __future__ import annotations

import math
from dataclasses import replace

from transfer_surgery.cli.options import (
    Exclude,
    Include,
    InputSize,
    Json,
    Model,
    Role,
    Set,
    Source,
    choose,
    model_spec,
    run_errors,
)
from transfer_surgery.cli.printing import show
from transfer_surgery.sites import Plan, Site, find_activations


def plan(
    model: Model,
    source: Source = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    assignments: Set = None,
    input_size: InputSize = None,
    as_json: Json = False,
) -> None:
    """List the activations of a model, and which of them would be converted.

    Without options all of them are listed, with options those that [b]convert[/b] would convert.
    Nothing is computed or downloaded.

    [bold]Examples[/bold]

    transfer-surgery plan resnet50

    transfer-surgery plan timm:efficientnet_b0 --source silu --exclude "*.se" --json

    transfer-surgery plan nets.py:make_net --set width=64 --input-size 3x32x32
    """
    spec = model_spec(model, assignments, input_size)
    with run_errors():
        network = spec.build()
        found = find_activations(network, spec.example_input(network))
    chosen = choose(found, source, include, exclude, role)
    listed = chosen if any((source, include, exclude, role)) else _with_reasons(found, chosen)
    if as_json:
        show(listed.to_json())
        return
    gates = ", ".join(
        f"{sum(math.prod(site.granularity(name).gate_shape(site.shape)) for site in chosen):,} "
        f"per {name}"
        for name in ("layer", "channel", "neuron")
    )
    show(f"{listed}\n\n{len(chosen)} of {len(found)} sites would be converted; gates: {gates}")


def _with_reasons(found: Plan, chosen: Plan) -> Plan:
    """All sites, where those that are not chosen say why."""
    paths = {site.path for site in chosen}

    def reason(site: Site) -> str | None:
        return site.reason or (None if site.path in paths else f"role {site.role}")

    return replace(found, rows=tuple(replace(site, reason=reason(site)) for site in found))
