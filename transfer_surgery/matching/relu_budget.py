"""Which gates keep their source within a budget of neurons, as in selective linearisation.

A gate costs what its swap adds to the loss, to second order: half the squared error that the target
makes at each element, times the squared gradient there. Those are kept that cost most per neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._running import as_batches, prediction_mode
from transfer_surgery.matching.fit_weights import squared_gradients
from transfer_surgery.matching.least_squares import grouped
from transfer_surgery.matching.two_networks import SideBySide
from transfer_surgery.units import GatedActivation, affine_value


def choose_kept(
    model: nn.Module,
    units: Mapping[str, GatedActivation],
    batches: Iterable[Any],
    keep: int | float,
) -> dict[GatedActivation, Tensor]:
    """For each unit a mask over its gates: those that keep their source.

    Args:
        model: a converted model, best after `match_targets`; it is run in evaluation mode.
        units: those among whose gates is chosen, by path.
        batches: inputs without labels, as for `match_targets`.
        keep: neurons (int), or a share of them (float), that keep their source at most.

    Raises:
        ValueError: the budget is out of its range, or there are no batches.
    """
    total = sum(unit.neurons for unit in units.values())
    budget = keep if isinstance(keep, int) else int(keep * total)
    if isinstance(keep, bool) or not 0 <= budget <= total or (keep != 0 and budget == 0):
        raise ValueError(
            f"keep={keep!r}: give a number of the {total:,} neurons (int) or a share of them "
            "(float, from 0.0 to 1.0)."
        )
    networks = SideBySide(model, list(units.values()), as_batches(batches, model))
    with prediction_mode(model):
        costs = {unit: _costs(networks, unit) for unit in units.values()}
    sizes = {unit: unit.neurons // unit.gate.count for unit in units.values()}
    each = torch.cat([(cost / sizes[unit]).cpu() for unit, cost in costs.items()])
    size = [s for unit, s in sizes.items() for _ in range(unit.gate.count)]
    kept = torch.zeros(len(each), dtype=torch.bool)
    for gate in each.argsort(descending=True, stable=True).tolist():
        if size[gate] <= budget:
            kept[gate] = True
            budget -= size[gate]
    parts = torch.split(kept, [unit.gate.count for unit in sizes])
    return {unit: part.view(unit.gate.shape) for unit, part in zip(sizes, parts, strict=True)}


def _costs(networks: SideBySide, unit: GatedActivation) -> Tensor:
    """Of each gate, summed over its elements and the examples."""
    calls = networks.order([unit]).get(unit, 0)
    total = torch.zeros(unit.gate.count, dtype=torch.float64)
    for index, batch in enumerate(networks.batches if calls else []):
        with networks.original():
            seen = networks.see(unit, batch, calls)
        slopes = squared_gradients(networks, unit, batch, calls, seed=index)
        for (x, y), slope in zip(seen, slopes, strict=True):
            parameters = () if unit.affine is None else unit.affine.of(x)
            error = affine_value(x, unit.target, *parameters).double() - y
            cost = grouped(0.5 * slope * error.square(), unit.granularity, unit.channel_axis)
            total += cost.double().sum(1).cpu()
    return total
