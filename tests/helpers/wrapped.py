"""A small gated network, a step of its training and what `wrap_optimizer` refuses, for tests."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery import (
    GatedActivation,
    TransferSchedule,
    get_activation,
    structural_risk,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations, make_gate

GAMMA = 0.3
LENGTH = TransferSchedule(20)


def unit_of(width: int, kind: str = "hard_concrete") -> GatedActivation:
    relu, sin = get_activation("relu"), get_activation("sin")
    gate = make_gate(kind, (width,))
    return GatedActivation(relu, sin, gate, granularity="channel", neurons=width)


def network(kind: str = "hard_concrete", width: int = 6, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, width, bias=bias),
        unit_of(width, kind),
        nn.Linear(width, width, bias=bias),
        unit_of(width, kind),
        nn.Linear(width, 2, bias=bias),
    )


def mixed_network() -> nn.Sequential:
    """A network whose gates are between 0 and 1, so that task and risk both have a gradient."""
    model = network()
    for _, unit in gated_activations(model):
        nn.init.normal_(unit.log_alpha)
    return model


def log_alphas(model: nn.Module) -> Tensor:
    units = [unit for _, unit in gated_activations(model)]
    return torch.cat([unit.log_alpha.detach().flatten() for unit in units])


def task(model: nn.Module, seed: int) -> Tensor:
    """A loss on a batch of its own, with the same gate noise whenever it is computed."""
    torch.manual_seed(seed)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    return nn.functional.mse_loss(model(x), y)


def assert_same_weights(a: nn.Module, b: nn.Module, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=rtol, atol=atol)


def plain(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    loss = task(model, seed)
    (loss + GAMMA * structural_risk(model) if explicit else loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def closure_of(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> Any:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = task(model, seed)
        if explicit:
            loss = loss + GAMMA * structural_risk(model)
        loss.backward()
        return loss

    return evaluate


def closure(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    optimizer.step(closure_of(model, optimizer, explicit, seed))


def refused(
    error: type[Exception], message: str, model: nn.Module, optimizer: Any, **arguments: Any
) -> None:
    """Assert that wrapping fails with this message and leaves the optimizer as it was."""
    groups = getattr(optimizer, "param_groups", [])
    before = [{**group, "params": list(group["params"])} for group in groups]
    with pytest.raises(error, match=message):
        wrap_optimizer(optimizer, model, **arguments)
    assert before == groups
