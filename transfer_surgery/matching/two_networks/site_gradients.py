"""How much an error at the output of each site would change the answers of the original network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._running import hooked
from transfer_surgery._tensors import check_learns
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation


class SiteCall(NamedTuple):
    """One call of a unit in the original network; all three have the shape of the input."""

    input: Tensor
    output: Tensor
    squared_gradient: Tensor


def site_calls(
    networks: TwoNetworks, units: Sequence[GatedActivation], batch: Any, seed: int
) -> dict[GatedActivation, list[SiteCall]]:
    """What some sites get and give, with the squared gradients of the log-likelihood there.

    The label of each answer is drawn from the network's own answer, so the mean of the squares is
    the diagonal of the Fisher information. All sites together take one forward and one backward
    pass through the whole network.

    Args:
        networks: both networks; the original one is run.
        units: the sites in question.
        batch: a batch without labels.
        seed: of the labels.

    Returns:
        For each unit its calls, in order; none where it does not run.
    """
    check_learns(networks.model)
    calls: list[tuple[GatedActivation, Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    inputs: dict[nn.Module, Tensor] = {}

    # Copies: what comes behind a site may write into its tensors.
    def before(unit: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[unit] = args[0].detach().clone()

    def after(unit: Any, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output if output.requires_grad else output.requires_grad_())
        calls.append((unit, inputs.pop(unit), output.detach().clone()))

    handles = [unit.register_forward_pre_hook(before) for unit in units]
    handles += [unit.register_forward_hook(after) for unit in units]
    with hooked(*handles), torch.enable_grad():
        answers = networks.log_probabilities(batch)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(answers.detach().exp().cpu(), 1, generator=generator)
    with torch.enable_grad():
        loss = F.nll_loss(answers, labels[:, 0].to(answers.device), reduction="sum")
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    found: dict[GatedActivation, list[SiteCall]] = {unit: [] for unit in units}
    for (unit, x, y), gradient in zip(calls, gradients, strict=True):
        square = torch.zeros_like(y) if gradient is None else gradient.float().square()
        found[unit].append(SiteCall(x, y, square))
    return found
