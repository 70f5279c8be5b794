"""What every check of a tool comes down to: the network's answer beside the reference's."""

from __future__ import annotations

import torch
from torch import Tensor


class WrongError(AssertionError):
    """A tool gave another answer for the network than for the reference, without an error."""


def expect_equal(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Raise where they differ by more than a share of the largest value."""
    found, expected = found.detach().float(), expected.detach().float()
    if found.shape != expected.shape:
        raise WrongError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error = (found - expected).abs().max() / expected.abs().max()
    if not error <= share:
        raise WrongError(f"{float(error):.1%} off")


def one_step(network: torch.nn.Module, images: Tensor, rate: float = 0.1) -> None:
    """One step of SGD on the layers: gates and numbers of targets stay."""
    layers = [p for m in layers_of(network) for p in m.parameters()]
    optimizer = torch.optim.SGD([p for p in layers if p.requires_grad], rate)
    optimizer.zero_grad()
    network(images).square().mean().backward()
    optimizer.step()


def layers_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Its convolutions and linear layers."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return [module for module in network.modules() if isinstance(module, kinds)]
