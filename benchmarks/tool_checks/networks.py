"""One small network in four states, and the same functions written by hand in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transfer_surgery import (
    GatedActivation,
    HardConcrete,
    bake,
    convert,
    fold_targets,
    match_targets,
    swap_targets,
)

STATES = ("converted", "baked", "matched and baked", "folded")


class Network(nn.Module):
    """Three activations: before a convolution, before a pooling, before a linear layer."""

    def __init__(self, *activations: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.linear1, self.head = nn.Linear(32, 16), nn.Linear(16, 5)
        self.act1, self.act2, self.act3 = activations
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.head(self.act3(self.linear1(self.pool(x).flatten(1))))


class Gated(nn.Module):
    """``z * relu(x) + (1 - z) * sin(x)``."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.register_buffer("z", z)

    def forward(self, x: Tensor) -> Tensor:
        return self.z * torch.relu(x) + (1 - self.z) * torch.sin(x)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class FittedSine(nn.Module):
    """``a * sin(w*x + c) + b``."""

    def __init__(self, a: Tensor, w: Tensor, c: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.w, self.c, self.b = (nn.Parameter(p) for p in (a, w, c, b))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * torch.sin(self.w * x + self.c) + self.b


@dataclass(frozen=True)
class Case:
    """A network, and one of plain torch that computes the same with the same layers."""

    state: str
    network: nn.Module
    reference: nn.Module
    images: Tensor


def case(state: str) -> Case:
    """The network in one of `STATES`; in the first one gates are 0, 1 and between."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 12, 12)
    network = Network(*(nn.ReLU() for _ in range(3))).eval()
    convert(network, "sin", gate=HardConcrete(noise="none"), example_input=images)
    if state == "converted":
        for _, unit in _units(network):
            ends = torch.tensor([8.0, -8.0, 0.5, -0.7])
            unit.log_alpha.data = ends.repeat(unit.log_alpha.numel() // 4)
        gates = [(path, unit.gate.predict().detach()) for path, unit in _units(network)]
        return Case(state, network, _written(network, gates, Gated), images)
    if state == "baked":
        bake(swap_targets(network))
        plain = Network(Sine(), Sine(), Sine()).eval()
        plain.load_state_dict(network.state_dict())
        return Case(state, network, plain, images)
    match_targets(network, [torch.randn(64, 3, 12, 12)])
    swap_targets(network)
    with torch.no_grad():
        for _, unit in _units(network):  # away from a fit that may be 1, 1, 0, 0 somewhere
            for parameter in unit.add_fitted_target().parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    numbers = [
        (path, *(p.detach().clone() for p in unit.add_fitted_target().parameters()))
        for path, unit in _units(network)
    ]
    reference = _written(network, numbers, FittedSine)
    bake(network)
    if state == "folded":
        fold_targets(network, images)
        # The reference gets the layers of the folded network: the checks compare layers, too.
        reference.load_state_dict(_layers(network), strict=False)
        for (path, *_), module in zip(numbers, _activations(reference), strict=True):
            folded = network.get_submodule(path)
            for name, neutral in zip("awcb", (1.0, 1.0, 0.0, 0.0), strict=True):
                kept = getattr(folded, name, None)
                value = torch.full_like(getattr(module, name), neutral) if kept is None else kept
                shape = getattr(module, name).shape
                getattr(module, name).data = value.detach().clone().reshape(shape)
    return Case(state, network, reference, images)


def _units(network: nn.Module) -> Iterator[tuple[str, GatedActivation]]:
    for path, module in network.named_modules():
        if isinstance(module, GatedActivation):
            yield path, module


def _activations(network: nn.Module) -> list[nn.Module]:
    return [network.act1, network.act2, network.act3]


def _written(
    network: nn.Module,
    numbers: list[tuple[str, *tuple[Tensor, ...]]],
    make: Callable[..., nn.Module],
) -> Network:
    """The network with activations written by hand, of these numbers per channel."""
    made = []
    for path, *values in numbers:
        shape = (-1,) if path == "act3" else (-1, 1, 1)
        made.append(make(*(value.clone().reshape(shape) for value in values)))
    written = Network(*made).eval()
    written.load_state_dict(_layers(network), strict=False)
    return written


def _layers(network: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in network.state_dict().items() if not k.startswith("act")}
