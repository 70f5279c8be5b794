"""Small networks that `convert` changes in every way, for tests of torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.loops import task
from transfer_surgery import HardConcrete, convert
from transfer_surgery.units import gated_activations


class Functional(nn.Module):
    """Functions and methods, in place and not: `convert` rewrites this forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6 * 3 * 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = F.relu(self.second(x) - x.mean(), inplace=True)
        y = x * 0.5 - 0.1
        return self.head((F.silu(y) + y.relu_()).flatten(1))


class InPlace(nn.Module):
    """An activation in place of a tensor that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.head = nn.Linear(50, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        y = self.act(x)
        return self.head(x + y)


def modules() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3),
        nn.GELU(),
        nn.Conv2d(6, 6, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 2),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "modules": modules,
    "functional": Functional,
    "in place": InPlace,
}
WAYS: dict[str, dict[str, Any]] = {
    "channel": {},
    "layer": {"granularity": "layer"},
    "neuron": {"granularity": "neuron"},
    "example": {"gate": HardConcrete(noise="example")},
    "neuron-example": {"granularity": "neuron", "gate": HardConcrete(noise="example")},
    "none": {"gate": HardConcrete(noise="none")},
    "bernoulli": {"gate": "bernoulli"},
    "snake": {"target": "snake(a=0.5)"},
}


def converted(name: str, way: str = "channel") -> nn.Module:
    torch.manual_seed(0)
    return convert(NETS[name](), example_input=torch.zeros(2, 2, 5, 5), seed=1, **WAYS[way])


def compiled(model: nn.Module, backend: str = "aot_eager", dynamic: bool | None = None) -> Any:
    torch.compiler.reset()  # another model of this class, or the other mode, is no recompilation
    return torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)


def gradients(run: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss = task(run, 0)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(f"{path}.gate.log_alpha" in found for path, _ in gated_activations(model))
    return {"loss": loss.detach()} | found
