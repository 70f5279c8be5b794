"""Which gates keep their source within a budget of neurons, as in selective linearisation.

The cost of a gate is what its swap adds to the loss, to second order: half the squared error of the
target at each element, times the squared gradient there. The gates that cost most per neuron stay.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import user_stacklevel
from transfer_surgery._running import as_batches, prediction_mode
from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.match_report import MatchWarning
from transfer_surgery.matching.two_networks.site_gradients import site_calls
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation, fitted_value


def choose_kept(
    model: nn.Module,
    units: Mapping[str, GatedActivation],
    batches: Iterable[Any],
    keep: int | float,
    logits: bool,
) -> dict[GatedActivation, Tensor]:
    """For each unit a mask over its gates, which is True for gates that keep their source.

    Each ``unit.neurons`` becomes what the batches show.

    Args:
        model: a converted model, best after `match_targets`; it is run in evaluation mode.
        units: the units whose gates are in question, by path.
        batches: inputs without labels, as for `match_targets`.
        keep: how many neurons keep their source at most: a number (int) or a share (float).
        logits: whether the model returns logits of classes.

    Raises:
        ValueError: the budget is out of its range, or there are no batches.

    Warns:
        MatchWarning: the budget is too small for any gate.
    """
    check_budget(keep)
    networks = TwoNetworks(model, list(units.values()), as_batches(batches, model))
    with prediction_mode(model):
        costs, neurons = _costs(networks, logits)
    budget = neurons_of(keep, sum(neurons.values()))
    # Where `convert` had no example of this size, it counted neurons of another one.
    for unit, number in neurons.items():
        unit.neurons = number
    # Keep gate after gate, from the most costly neuron down, while the budget lasts.
    sizes = {unit: unit.neurons // unit.gate.count for unit in units.values()}
    each = torch.cat([(cost / sizes[unit]).cpu() for unit, cost in costs.items()])
    size = [s for unit, s in sizes.items() for _ in range(unit.gate.count)]
    kept = torch.zeros(len(each), dtype=torch.bool)
    for gate in each.argsort(descending=True, stable=True).tolist():
        if size[gate] <= budget:
            kept[gate] = True
            budget -= size[gate]
    if keep and not kept.any():
        warnings.warn(
            f"keep={keep!r} keeps nothing: the smallest gate has {min(size):,} neurons. Take a "
            "larger budget, or convert with granularity='neuron'.",
            MatchWarning,
            stacklevel=user_stacklevel(),
        )
    parts = torch.split(kept, [unit.gate.count for unit in sizes])
    return {unit: part.view(unit.gate.shape) for unit, part in zip(sizes, parts, strict=True)}


def check_budget(keep: int | float) -> None:
    """Raise ValueError where a number or a share of neurons is out of its range, however many."""
    if not (keep >= 0 and (isinstance(keep, Integral) or keep <= 1)):
        raise ValueError(
            f"keep={keep!r}: give a number of the neurons (int) or a share of them (float, from "
            "0.0 to 1.0)."
        )


def neurons_of(keep: int | float, total: int) -> int:
    """The number of neurons that a budget means, of this number.

    Raises:
        ValueError: it is out of its range.
    """
    check_budget(keep)
    budget = int(keep if isinstance(keep, Integral) else keep * total)
    if budget > total or (keep and not budget):
        raise ValueError(
            f"keep={keep!r}: give a number of the {total:,} neurons (int) or a share of them "
            "(float, from 0.0 to 1.0)."
        )
    return budget


def _costs(
    networks: TwoNetworks, logits: bool
) -> tuple[dict[GatedActivation, Tensor], dict[GatedActivation, int]]:
    """The cost of each gate of each unit, summed over its elements and the examples.

    Beside it the neurons of each unit for one example, in the batch that has most of them.
    """
    neurons: dict[GatedActivation, int] = {}
    total = {unit: torch.zeros(unit.gate.count, dtype=torch.float64) for unit in networks.units}
    for index, batch in enumerate(networks.batches):
        examples = _examples(batch)
        for unit, calls in site_calls(networks, networks.units, batch, index, logits).items():
            # A site may get the tokens of all examples along one axis, or run several times.
            if calls:
                of_one = math.ceil(sum(call.input.numel() for call in calls) / examples)
                neurons[unit] = max(neurons.get(unit, 0), of_one)
            for x, y, squared_gradient in calls:
                numbers = None if unit.fitted is None else unit.fitted.expand(x)
                error = fitted_value(x, unit.target, numbers).double() - y
                cost = unit.granularity.group(0.5 * squared_gradient * error.square())
                total[unit] += cost.double().sum(1).cpu()
    return total, {unit: neurons.get(unit, unit.neurons) for unit in networks.units}


def _examples(batch: Any) -> int:
    """The number of examples of a batch: the first axis of its first tensor."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, batch)
    return max(len(tensors[0]), 1) if tensors[0].dim() else 1
