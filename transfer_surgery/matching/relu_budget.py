"""Which gates keep their source within a budget of neurons, as in selective linearisation.

The cost of a gate is what its swap adds to the loss, to second order: half the squared error of the
target at each element, times the squared gradient there. The gates that cost most per neuron stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._running import as_batches, prediction_mode
from transfer_surgery.matching.least_squares import grouped
from transfer_surgery.matching.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation, fitted_value


def choose_kept(
    model: nn.Module,
    units: Mapping[str, GatedActivation],
    batches: Iterable[Any],
    keep: int | float,
) -> dict[GatedActivation, Tensor]:
    """For each unit a mask over its gates, which is True for gates that keep their source.

    Args:
        model: a converted model, best after `match_targets`; it is run in evaluation mode.
        units: the units whose gates are in question, by path.
        batches: inputs without labels, as for `match_targets`.
        keep: how many neurons keep their source at most: a number (int) or a share (float).

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
    networks = TwoNetworks(model, list(units.values()), as_batches(batches, model))
    with prediction_mode(model):
        costs = {unit: _costs(networks, unit) for unit in units.values()}
    # Keep gate after gate, from the most costly neuron down, while the budget lasts.
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


def _costs(networks: TwoNetworks, unit: GatedActivation) -> Tensor:
    """The cost of each gate, summed over its elements and the examples."""
    calls = networks.count_calls([unit]).get(unit, 0)
    total = torch.zeros(unit.gate.count, dtype=torch.float64)
    for index, batch in enumerate(networks.batches if calls else []):
        seen = networks.see(unit, batch, calls)
        slopes = squared_gradients(networks, unit, batch, calls, seed=index)
        for (x, y), slope in zip(seen, slopes, strict=True):
            parameters = None if unit.fitted is None else unit.fitted.expand(x)
            error = fitted_value(x, unit.target, parameters).double() - y
            cost = grouped(0.5 * slope * error.square(), unit.granularity)
            total += cost.double().sum(1).cpu()
    return total


def squared_gradients(
    networks: TwoNetworks, unit: GatedActivation, batch: Any, calls: int, seed: int
) -> list[Tensor]:
    """Squared gradients of the original network's log-likelihood at the outputs of a site.

    The label of each output is drawn from the network's own answer, so the mean of the squares is
    the diagonal of the Fisher information: how much an error there changes the answer. This takes a
    forward and a backward pass through the whole network.

    Returns:
        For each call of the unit a tensor of the shape of its output.
    """
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output if output.requires_grad else output.requires_grad_())

    handle = unit.register_forward_hook(note)
    try:
        with torch.enable_grad():
            answers = networks.log_probabilities(batch)
    finally:
        handle.remove()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(answers.detach().exp().cpu(), 1, generator=generator)
    with torch.enable_grad():
        loss = F.nll_loss(answers, labels[:, 0].to(answers.device), reduction="sum")
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    return [
        torch.zeros_like(y) if g is None else g.float().square()
        for g, y in zip(gradients[:calls], outputs, strict=False)
    ]
