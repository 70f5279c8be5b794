"""sensitivity: what it costs to swap each site alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transfer_surgery._arguments import check_arguments
from transfer_surgery._running import as_batches, kl_divergence, prediction_mode
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery._table import Column, Table
from transfer_surgery.matching.two_networks import TwoNetworks
from transfer_surgery.units import select_units


@dataclass(frozen=True)
class SensitivityRow:
    """One site, swapped alone.

    Args:
        path: where its unit lives in the model.
        source: the activation that the network had.
        target: the activation that it is swapped to.
        divergence: mean KL divergence of the outputs, read as logits, from those of the original
            network.
        changed: share of the outputs whose largest logit is not that of the original network.
    """

    path: str
    source: str
    target: str
    divergence: float
    changed: float


@dataclass(frozen=True, repr=False)
class Sensitivity(Table[SensitivityRow]):
    """What each site costs: a table from the site that costs least to the one that costs most."""

    columns = (
        Column("path"),
        Column("source"),
        Column("target"),
        Column("divergence", "KL", ".5f"),
        Column("changed", "answers changed", ".1%"),
    )

    @property
    def order(self) -> tuple[str, ...]:
        """Paths from the cheapest site on, as ``TransferSchedule(order=...)`` takes them."""
        return tuple(row.path for row in self.rows)


def sensitivity(
    model: nn.Module, batches: Iterable[Any], *, include: Any = None, exclude: Any = None
) -> Sensitivity:
    """Swap one site at a time to its target, and compare the outputs with the original ones.

    It shows which sites to leave out (``exclude=``). The other sites run at their source, and the
    model is not changed. It takes one run of the model per site and batch.

    Args:
        model: a converted model, best after `match_targets`; it is run in evaluation mode.
        batches: inputs without labels, as for `match_targets`.
        include: sites to look at: patterns as in `convert` (a predicate gets the unit); None: all.
        exclude: sites to leave out, in the same forms.

    Returns:
        A row per site, the cheapest first.

    Raises:
        ValueError: the model is not converted, there are no batches, a pattern matches nothing, or
            the outputs are not finite.
        TypeError: the model is sharded by FSDP2, or returns no floating tensor.

    Examples:
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
    count = 0
    with prediction_mode(model):
        # For each site the sum of the divergences, and how many largest logits are other ones.
        found = {path: torch.zeros(2, dtype=torch.float64) for path in units}
        for batch in networks.batches:
            wanted = networks.log_probabilities(batch)
            count += wanted.shape[0]
            for path, unit in units.items():
                now = networks.log_probabilities(batch, {unit})
                kl = kl_divergence(now, wanted) * wanted.shape[0]
                changed = (now.argmax(1) != wanted.argmax(1)).sum()
                found[path] += torch.stack([kl.double(), changed.double()]).cpu()
    rows = []
    for path, unit in units.items():
        divergence, changed = (found[path] / count).tolist()
        if not math.isfinite(divergence):
            raise ValueError(
                f"{path}: the outputs, or those of the original network, are not finite. Look for "
                "NaN in the batches; a network that overflows in half precision needs float32."
            )
        rows.append(SensitivityRow(path, str(unit.source), str(unit.target), divergence, changed))
    return Sensitivity(tuple(sorted(rows, key=lambda row: row.divergence)))
