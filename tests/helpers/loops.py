"""A small converted network, and what training loops are held to; shared by several tests.

The reference of a loop is the same loop on a copy of the model, with an optimizer that is not
wrapped and autograd of ``GAMMA * structural_risk``.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery import TransferSchedule, convert, structural_risk, wrap_optimizer
from transfer_surgery.units import gated_activations

GAMMA = 0.3

Make = Callable[[nn.Module], Optimizer]
Loop = Callable[[nn.Module, Optimizer, bool, int], None]
"""One optimizer step: model, optimizer, whether to add the risk here, seed of the batch."""


def network() -> nn.Sequential:
    """Convolutions, batch norm, an in-place and another activation; converted; always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        # No bias: before a batch norm its gradient is rounding alone, which Adam's kin blow up.
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.GELU()),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 2),
    )
    return convert(model, example_input=torch.zeros(2, 2, 5, 5), seed=1)


def mid_transfer(model: nn.Sequential) -> nn.Sequential:
    """Gates between 0 and 1, so that task and risk both have a gradient."""
    generator = torch.Generator().manual_seed(2)
    for gate in gates(model):
        gate.data.normal_(generator=generator)
    return model


def gates(model: nn.Module) -> list[nn.Parameter]:
    return [unit.log_alpha for _, unit in gated_activations(model)]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(8, *shape, generator=generator) for shape in ((2, 5, 5), (2,)))
    return x, y


def task(model: nn.Module, seed: int) -> Tensor:
    """A loss on a batch of its own, with the same gate noise whenever it is computed."""
    x, y = batch(seed)
    torch.manual_seed(seed)
    return nn.functional.mse_loss(model(x).float(), y)


def risk(model: nn.Module) -> Tensor:
    return GAMMA * structural_risk(model)


def plain(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    loss = task(model, seed)
    (loss + risk(model) if explicit else loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_loop_equals_the_explicit_one(
    make: Make, loop: Loop, *, rtol: float = 2e-5, atol: float = 2e-6, **settings: Any
) -> None:
    """Three steps with the risk of `wrap_optimizer` are those with autograd of it."""
    model = mid_transfer(network())
    reference, before = copy.deepcopy(model), copy.deepcopy(model)
    wrapped = wrap_optimizer(make(model), model, gamma=GAMMA, **settings)
    explicit = make(reference)
    for seed in range(3):
        torch.manual_seed(seed)  # also for optimizers that draw numbers
        loop(model, wrapped, False, seed)
        torch.manual_seed(seed)
        loop(reference, explicit, True, seed)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=rtol, atol=atol)
    for old, new in zip(gates(before), gates(model), strict=True):
        assert not torch.equal(old, new)


def assert_loop_reaches_the_budget(make: Make, loop: Loop, **settings: Any) -> None:
    """The schedule is kept after every step, and ends with all gates at 0."""
    model, schedule = network(), TransferSchedule(10, start=0, end=0.8)
    optimizer = wrap_optimizer(make(model), model, transfer=schedule, **settings)
    for step in range(1, 10):
        loop(model, optimizer, False, step)
        assert mean_probability(model) == pytest.approx(schedule.budget(step), abs=1e-3)
    assert all((unit.gate.predict() == 0).all() for _, unit in gated_activations(model))


def mean_probability(model: nn.Module) -> float:
    return structural_risk(model, "mean").item()
