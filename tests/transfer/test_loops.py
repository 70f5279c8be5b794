"""A step of a wrapped optimizer equals a step of the explicit loss, however the loop is written."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from tests.helpers.explicit_loss import (
    GAMMA,
    Loop,
    Make,
    assert_loop_equals_the_explicit_one,
    assert_loop_reaches_the_budget,
    assert_same_weights,
    closure,
    closure_of,
    gated_mlp,
    mid_transfer,
    plain,
    risk,
    task,
)
from transfer_surgery import TransferSchedule, wrap_optimizer

# eps: where a gradient is 0 up to rounding, the default of Adam turns rounding into full steps.
OPTIMIZERS: dict[str, Make] = {
    "sgd-momentum": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov-foreach": lambda m: SGD(
        m.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True
    ),
    "sgd-fused": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=0.01, eps=1e-4),
    "adam-tensor-lr": lambda m: Adam(
        m.parameters(), lr=torch.tensor(0.01), eps=1e-4, foreach=False
    ),
    "adam-fused-tensor-lr": lambda m: Adam(
        m.parameters(), lr=torch.tensor(0.01), eps=1e-4, fused=True
    ),
    "adamw-foreach": lambda m: AdamW(m.parameters(), lr=0.01, eps=1e-4, foreach=True),
    "adamw-fused": lambda m: AdamW(m.parameters(), lr=0.01, eps=1e-4, fused=True),
}


def accumulated(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    for part in range(4):
        (task(model, 10 * seed + part) / 4).backward()
    if explicit:
        risk(model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def keyword_closure(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    optimizer.step(closure=closure_of(model, optimizer, explicit, seed))


def bfloat16(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(model, seed)
        if explicit:
            loss = loss + risk(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def step_inside_autocast(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain(model, optimizer, explicit, seed)


def float16_scaled(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16):
        loss = task(model, seed)
    scaler.scale(loss + risk(model) if explicit else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**8  # no step was skipped
    optimizer.zero_grad()


def float16_clipped(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for part in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = task(model, 10 * seed + part) / 2
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if explicit:  # clipping sees the task only
        risk(model).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def clipped_by_norm(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    task(model, seed).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1  # or this shows nothing
    if explicit:
        risk(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def cleared_in_turns(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    """Gradients are tensors of zeros, None, or None in the model and not in the optimizer."""
    loss = task(model, seed)
    (loss + risk(model) if explicit else loss).backward()
    optimizer.step()
    if seed % 3 == 2:
        model.zero_grad()
    else:
        optimizer.zero_grad(set_to_none=seed % 3 == 1)


LOOPS: list[Loop] = [
    plain,
    accumulated,
    closure,
    keyword_closure,
    bfloat16,
    step_inside_autocast,
    float16_scaled,
    float16_clipped,
    clipped_by_norm,
    cleared_in_turns,
]

# `make test` takes every optimizer with one loop, and every loop with two optimizers that differ in
# what they do inside of `step`; `make slow` takes the rest of the product.
QUICK = {"sgd-momentum", "adamw-fused"}
PRODUCT = [
    pytest.param(
        name,
        loop,
        id=f"{name}-{loop.__name__}",
        marks=() if loop is plain or name in QUICK else pytest.mark.slow,
    )
    for name in OPTIMIZERS
    for loop in LOOPS
]


@pytest.mark.parametrize(("name", "loop"), PRODUCT)
def test_steps_equal_those_of_the_explicit_loss(name: str, loop: Loop) -> None:
    assert_loop_equals_the_explicit_one(OPTIMIZERS[name], loop)


@pytest.mark.parametrize(("name", "loop"), PRODUCT)
def test_gates_keep_to_the_schedule(name: str, loop: Loop) -> None:
    assert_loop_reaches_the_budget(OPTIMIZERS[name], loop)


@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": TransferSchedule(3, start=0)}])
@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-fused", "adam-tensor-lr", "adamw-fused"])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(name: str, how: dict[str, Any]) -> None:
    model = mid_transfer(gated_mlp())
    optimizer = wrap_optimizer(OPTIMIZERS[name](model), model, **how)
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(task(model, 0) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_weights(model, before, rtol=0, atol=0)
