"""Small networks that `convert` changes in every way, for tests of torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.explicit_loss import task
from tests.helpers.networks import functional, in_place, small_cnn
from transfer_surgery import HardConcrete, convert
from transfer_surgery.units import gated_activations

NETS: dict[str, Callable[[], nn.Module]] = {
    "modules": small_cnn,
    "functional": functional,
    "in place": in_place,
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
