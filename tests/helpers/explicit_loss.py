"""Training loops, and the explicit loss ``task + GAMMA * structural_risk`` as their reference.

`wrap_optimizer` is held to the explicit loss: the same loop runs on a copy of the model, with an
optimizer that is not wrapped and autograd of that loss.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.helpers.networks import example_of, input_shape, small_cnn, small_mlp
from transfer_surgery import TransferSchedule, convert, structural_risk, wrap_optimizer
from transfer_surgery.units import gated_activations

GAMMA = 0.3
SCHEDULE = TransferSchedule(20)

Make = Callable[[nn.Module], Optimizer]
Loop = Callable[[nn.Module, Optimizer, bool, int], None]
"""One optimizer step: model, optimizer, whether to add the risk here, seed of the batch."""


# ---- converted networks


def gated_mlp(gate: str = "hard_concrete", width: int = 6, bias: bool = True) -> nn.Sequential:
    model = small_mlp(width, bias)
    return convert(model, example_input=example_of(model), gate=gate, seed=1)


def gated_cnn() -> nn.Sequential:
    return copy.deepcopy(_converted_cnn())


@functools.cache  # most of a short test would be the conversion
def _converted_cnn() -> nn.Sequential:
    model = small_cnn()
    return convert(model, example_input=example_of(model), seed=1)


def mid_transfer(model: Any) -> Any:
    """Gates between 0 and 1, so that task and risk both have a gradient."""
    generator = torch.Generator().manual_seed(2)
    for gate in gates(model):
        gate.data.normal_(generator=generator)
    return model


def gates(model: nn.Module) -> list[nn.Parameter]:
    return [unit.log_alpha for _, unit in gated_activations(model) if unit.gate.learned]


def log_alphas(model: nn.Module) -> Tensor:
    """A copy of all gates' log_alpha, one after the other."""
    return torch.cat([gate.detach().flatten() for gate in gates(model)])


def set_gates(model: nn.Module, log_alpha: float) -> None:
    for gate in gates(model):
        nn.init.constant_(gate, log_alpha)


def mean_probability(model: nn.Module) -> float:
    return structural_risk(model, "mean").item()


def assert_transferred(model: nn.Module) -> None:
    assert all(bool((unit.gate.predict() == 0).all()) for _, unit in gated_activations(model))


# ---- one step of a training


def batch(seed: int, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """8 examples for a network: images, unless the network takes features."""
    shape = (2, 5, 5) if model is None else input_shape(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, *shape, generator=generator), torch.randn(8, 2, generator=generator)


def task(model: nn.Module, seed: int) -> Tensor:
    """A loss on a batch of its own, with the same gate noise whenever it is computed."""
    x, y = batch(seed, model)
    torch.manual_seed(seed)
    return nn.functional.mse_loss(model(x).float(), y)


def risk(model: nn.Module) -> Tensor:
    return GAMMA * structural_risk(model)


def plain(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    loss = task(model, seed)
    (loss + risk(model) if explicit else loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def closure_of(
    model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int
) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = task(model, seed)
        if explicit:
            loss = loss + risk(model)
        loss.backward()
        return loss

    return evaluate


def closure(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    optimizer.step(closure_of(model, optimizer, explicit, seed))


# ---- what is promised


def assert_same_weights(a: nn.Module, b: nn.Module, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=rtol, atol=atol)


def assert_loop_equals_the_explicit_one(
    make: Make, loop: Loop, *, rtol: float = 2e-5, atol: float = 2e-6, **settings: Any
) -> None:
    """Three steps with the risk of `wrap_optimizer` are those with autograd of it."""
    model = mid_transfer(gated_cnn())
    reference, before = copy.deepcopy(model), copy.deepcopy(model)
    wrapped = wrap_optimizer(make(model), model, gamma=GAMMA, **settings)
    explicit = make(reference)
    for seed in range(3):
        torch.manual_seed(seed)  # also for optimizers that draw numbers
        loop(model, wrapped, False, seed)
        torch.manual_seed(seed)
        loop(reference, explicit, True, seed)
    assert_same_weights(model, reference, rtol, atol)
    for old, new in zip(gates(before), gates(model), strict=True):
        assert not torch.equal(old, new)


def assert_loop_reaches_the_budget(make: Make, loop: Loop, **settings: Any) -> None:
    """The schedule is kept after every step, and ends with all gates at 0."""
    model, schedule = gated_cnn(), TransferSchedule(10, start=0, end=0.8)
    optimizer = wrap_optimizer(make(model), model, transfer=schedule, **settings)
    for step in range(1, 10):
        loop(model, optimizer, False, step)
        assert mean_probability(model) == pytest.approx(schedule.budget(step), abs=1e-3)
    assert_transferred(model)


def refused(
    error: type[Exception], message: str, model: nn.Module, optimizer: Any, **arguments: Any
) -> None:
    """Assert that wrapping fails with this message and leaves the optimizer as it was."""
    groups = getattr(optimizer, "param_groups", [])
    before = [{**group, "params": list(group["params"])} for group in groups]
    with pytest.raises(error, match=message):
        wrap_optimizer(optimizer, model, **arguments)
    assert before == groups
