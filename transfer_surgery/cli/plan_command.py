"""``transfer-surgery plan``: what would be converted, and how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer

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
    show,
)
from transfer_surgery.sites import Plan, Site, find_activations

_GRANULARITIES = ("layer", "channel", "neuron")


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
        whole = find_activations(network, spec.example_input(network))
    chosen = choose(whole, source, include, exclude, role)
    filtered = any((source, include, exclude, role))
    listed = chosen if filtered else whole
    paths = {site.path for site in chosen}
    if as_json:
        typer.echo(json.dumps([_to_dict(site, paths) for site in listed], indent=2))
        return
    headings = ("path", "activation", "role", "kind", "shape", "axis", *_GRANULARITIES, "way")
    show(headings, [_row(site, paths) for site in listed], right=("axis", *_GRANULARITIES))
    for note in whole.unexamined:
        typer.echo(f"note: {note}")
    gates = ", ".join(f"{_count(chosen, name):,} per {name}" for name in _GRANULARITIES)
    typer.echo(f"\n{len(chosen)} of {len(whole)} sites would be converted; gates: {gates}")


def _row(site: Site, chosen: set[str]) -> Sequence[str]:
    gates = (f"{number:,}" if number else "-" for number in _gates(site).values())
    return (
        site.path,
        str(site.source),
        site.role,
        site.call,
        "x".join(map(str, site.shape)),
        str(site.channel_axis),
        *gates,
        _way(site, chosen),
    )


def _way(site: Site, chosen: set[str]) -> str:
    if site.reason is None and site.path not in chosen:
        return f"not converted: role {site.role}"
    return site.outcome


def _gates(site: Site) -> dict[str, int | None]:
    """Number of gates at each granularity; None where the input has no such axis."""
    counts: dict[str, int | None] = {"layer": 1, "channel": None, "neuron": None}
    if len(site.shape) > 1:
        counts |= {"channel": site.gate_shape("channel")[0], "neuron": site.neurons}
    return counts


def _count(sites: Plan, granularity: str) -> int:
    return sum(_gates(site)[granularity] or 0 for site in sites)


def _to_dict(site: Site, chosen: set[str]) -> dict[str, Any]:
    return {**site.to_dict(), "gates": _gates(site), "converted": site.path in chosen}
