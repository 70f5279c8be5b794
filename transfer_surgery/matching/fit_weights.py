"""What an error at a site costs: weights for the least squares of `match_targets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery.matching.layer_refit import can_be_refitted
from transfer_surgery.matching.two_networks import SideBySide
from transfer_surgery.units import GatedActivation

WEIGHTS = (None, "gradient", "next_layer")
_FLOOR = 0.01  # share of the mean weight that each element has at least


def gradient_weights(
    networks: SideBySide, unit: GatedActivation, batch: Any, calls: int, seed: int
) -> list[Tensor]:
    """Squared gradients of the original network's log-likelihood at the outputs of a site.

    Returns:
        For each call of the unit a tensor of the shape of its output, with the mean 1.
    """
    return [_with_floor(g) for g in squared_gradients(networks, unit, batch, calls, seed)]


def squared_gradients(
    networks: SideBySide, unit: GatedActivation, batch: Any, calls: int, seed: int
) -> list[Tensor]:
    """Those of `gradient_weights` as they are, for each call of the unit.

    The label of each output is drawn from the network's own answer, so that the mean of the squares
    is the diagonal of the Fisher information: how much an error there moves the answer. It takes a
    run and its backward pass through the whole network.
    """
    with networks.original(), torch.enable_grad(), _outputs(unit) as outputs:
        answers = networks.log_probabilities(batch)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(answers.detach().exp().cpu(), 1, generator=generator)
        loss = F.nll_loss(answers, labels[:, 0].to(answers.device), reduction="sum")
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    return [
        torch.zeros_like(y) if g is None else g.float().square()
        for g, y in zip(gradients[:calls], outputs, strict=False)
    ]


@contextmanager
def _outputs(unit: GatedActivation) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(output if output.requires_grad else output.requires_grad_())

    handle = unit.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def next_layer_weights(networks: SideBySide, unit: GatedActivation, y: Tensor) -> Tensor:
    """Squared norms of the weights by which the layers behind a site read each of its channels.

    Args:
        networks: both networks.
        unit: the site.
        y: an output of it.

    Returns:
        A tensor that broadcasts to ``y``, with the mean 1; 1 where no linear layer or ordinary
        convolution reads the output itself.
    """
    readers: list[nn.Module] = []
    outputs: list[Tensor] = []

    def read(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if any(args[0] is output for output in outputs):
            readers.append(layer)

    layers = [module for module in networks.model.modules() if can_be_refitted(module)]
    handles = [layer.register_forward_pre_hook(read) for layer in layers]
    handles.append(unit.register_forward_hook(lambda m, args, output: outputs.append(output)))
    try:
        with networks.original():
            networks.run(networks.batches[0])
    finally:
        for handle in handles:
            handle.remove()
    shape = [1] * y.dim()
    if not readers:
        return y.new_ones(shape)
    axis = 1 if isinstance(readers[0], nn.Conv2d) else y.dim() - 1
    shape[axis] = y.shape[axis]
    return _with_floor(_squares(readers)).reshape(shape)


def _squares(readers: Sequence[Any]) -> Tensor:
    """Sum over layers, outputs and places of the kernel."""
    total = [layer.weight.float().square().transpose(0, 1).flatten(1).sum(1) for layer in readers]
    return torch.stack(total).sum(0)


def _with_floor(weights: Tensor) -> Tensor:
    mean = weights.mean()
    if not bool(mean > 0):
        return torch.ones_like(weights)
    return (weights / mean + _FLOOR) / (1 + _FLOOR)
