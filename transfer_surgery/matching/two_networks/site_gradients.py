"""How much an error at the output of each site would change the outputs of the original network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._running import hooked
from transfer_surgery._tensors import check_learns
from transfer_surgery.matching.answers import log_probabilities
from transfer_surgery.matching.output_errors import (
    OutputErrors,
    logits_if_declared,
    output_tensors,
)
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation, watched_inputs


class SiteCall(NamedTuple):
    """One call of a unit in the original network; all three have the shape of the input."""

    input: Tensor
    output: Tensor
    squared_gradient: Tensor


def site_calls(
    networks: TwoNetworks, units: Sequence[GatedActivation], batch: Any, seed: int, logits: bool
) -> dict[GatedActivation, list[SiteCall]]:
    """What some sites get and give, with the squared gradients of the outputs there.

    The mean of the squares over many seeds is what a small error there adds to the errors by which
    outputs are compared: to the KL divergence of logits, twice; of other outputs to the relative
    squared errors of all, summed over the examples. All sites together take one forward and one
    backward pass through the whole network.

    Args:
        networks: both networks; the original one is run.
        units: the sites in question.
        batch: a batch without labels.
        seed: of the labels or signs that are drawn.
        logits: whether the outputs are logits of classes.

    Returns:
        For each unit its calls, in order; none where it does not run.

    Raises:
        ValueError: no gradient comes from the outputs.
    """
    check_learns(networks.model)
    calls: list[tuple[GatedActivation, Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    inputs: dict[nn.Module, Tensor] = {}

    # Copies: what comes behind a site may write into its tensors.
    def before(unit: GatedActivation, x: Tensor) -> None:
        inputs[unit] = x.detach().clone()

    def after(unit: Any, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output if output.requires_grad else output.requires_grad_())
        calls.append((unit, inputs.pop(unit), output.detach().clone()))

    hooks = hooked(*(unit.register_forward_hook(after) for unit in units))
    with watched_inputs(units, before), hooks, torch.enable_grad():
        answer = networks.with_gradients_if_needed(lambda: networks.run(batch))
        loss = _drawn_loss(answer, torch.Generator().manual_seed(seed), logits)
        if not loss.requires_grad:
            raise ValueError(
                "no gradient comes from the outputs of the model to its activations, so that these "
                "cannot be weighed: let it return tensors without detach() or torch.no_grad()."
            )
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    found: dict[GatedActivation, list[SiteCall]] = {unit: [] for unit in units}
    for (unit, x, y), gradient in zip(calls, gradients, strict=True):
        square = torch.zeros_like(y) if gradient is None else gradient.float().square()
        found[unit].append(SiteCall(x, y, square))
    return found


def _drawn_loss(output: Any, generator: torch.Generator, logits: bool) -> Tensor:
    """A number whose squared gradient is, on average, the cost of small errors of the outputs."""
    declared = logits_if_declared(output, logits)
    if declared is not None:
        # Labels drawn from the answers themselves: the squares are the Fisher information.
        answers = log_probabilities(declared)
        labels = torch.multinomial(answers.detach().exp().cpu(), 1, generator=generator)
        return F.nll_loss(answers, labels[:, 0].to(answers.device), reduction="sum")
    errors, tensors = OutputErrors(), output_tensors(output)
    errors.add(tensors, tensors)
    total = torch.zeros((), dtype=torch.float64)
    for name, scale in errors.scales().items():
        found = torch.where(tensors[name].isfinite(), tensors[name], 0.0).double()
        signs = 2.0 * torch.randint(2, found.shape, generator=generator) - 1
        of_one = scale * max(math.prod(found.shape[1:]), 1)  # what its relative error is divided by
        total = total + (signs.to(found) * found).sum().cpu() / of_one**0.5
    return total
