"""sensitivity: what it costs to swap each site alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._running import as_batches, prediction_mode
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery._table import Column, Table
from transfer_surgery.matching.output_errors import OutputChange, error_cell
from transfer_surgery.matching.two_networks.forward_state import ForwardState
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import select_units


@dataclass(frozen=True)
class SensitivityRow:
    """One site, swapped alone.

    Args:
        path: where its unit lives in the model.
        source: the activation that the network had.
        target: the activation that it is swapped to.
        errors: relative squared error of each output of the model: 0 is perfect, 1 is as good as
            the mean.
        divergence: mean KL divergence of the outputs from the original ones, if they are logits.
        changed: share of the answers whose largest logit is not the original one, if they are
            logits.
    """

    path: str
    source: str
    target: str
    errors: Mapping[str, float]
    divergence: float | None = None
    changed: float | None = None

    @property
    def cost(self) -> float:
        """The divergence, or the mean of the errors where the outputs are no logits."""
        if self.divergence is not None:
            return self.divergence
        return sum(self.errors.values()) / len(self.errors)


@dataclass(frozen=True, repr=False)
class Sensitivity(Table[SensitivityRow]):
    """What each site costs: a table from the site that costs least to the one that costs most."""

    columns = (
        Column("path"),
        Column("source"),
        Column("target"),
        Column("errors", "output error", error_cell),
        Column("divergence", "KL", ".5f"),
        Column("changed", "answers changed", ".1%"),
    )

    @property
    def order(self) -> tuple[str, ...]:
        """Paths from the cheapest site on, as ``TransferSchedule(order=...)`` takes them."""
        return tuple(row.path for row in self.rows)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Any = None,
    exclude: Any = None,
    logits: bool = False,
) -> Sensitivity:
    """Swap one site at a time to its target, and compare the outputs with the original ones.

    It shows which sites to leave out (``exclude=``). The other sites run at their source, and the
    model is not changed. It takes one run of the model per site and batch.

    Args:
        model: a converted model, best after `match_targets`; it is run in evaluation mode.
        batches: inputs without labels, as for `match_targets`.
        include: sites to look at: patterns as in `convert` (a predicate gets the unit); None: all.
        exclude: sites to leave out, in the same forms.
        logits: whether the model returns logits of classes, so that sites are sorted by the KL
            divergence. Outputs that are named ``logits`` are read so in any case.

    Returns:
        A row per site, the cheapest first.

    Raises:
        ValueError: the model is not converted, there are no batches, a pattern matches nothing, or
            the outputs are not finite.
        TypeError: the model is sharded by FSDP2, or returns no floating tensor.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert, match_targets
        >>> _ = torch.manual_seed(0)
        >>> layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)]
        >>> x = torch.randn(256, 4)
        >>> model = convert(nn.Sequential(*layers), example_input=x)
        >>> _ = match_targets(model, [x])
        >>> [row.path for row in sensitivity(model, [x])]
        ['3', '1']
    """
    check_arguments(sensitivity, locals())
    check_not_sharded(model)
    units = select_units(model, include, exclude)
    networks = TwoNetworks(model, list(units.values()), as_batches(batches, model))
    found = {path: OutputChange(logits) for path in units}
    with prediction_mode(model), ForwardState(model).watch():
        for batch in networks.batches:
            wanted = networks.with_gradients_if_needed(partial(networks.run, batch))
            for path, unit in units.items():
                found[path].add(networks.run(batch, {unit}), wanted)
    rows = []
    for path, unit in units.items():
        row = SensitivityRow(path, str(unit.source), str(unit.target), *found[path].values())
        if math.isnan(row.cost):
            raise ValueError(
                f"{path}: the outputs, or those of the original network, are not finite. Look for "
                "NaN in the batches; a network that overflows in half precision needs float32."
            )
        rows.append(row)
    return Sensitivity(tuple(sorted(rows, key=lambda row: row.cost)))
