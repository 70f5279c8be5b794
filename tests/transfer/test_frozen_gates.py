"""Gates that do not move are reported, and losses that are not finite stop the training."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, lr_scheduler

from tests.helpers.explicit_loss import (
    GAMMA,
    Make,
    assert_same_weights,
    gated_mlp,
    gates,
    log_alphas,
    mid_transfer,
    plain,
    set_gates,
    task,
)
from transfer_surgery import FrozenGatesWarning, TransferSchedule, wrap_optimizer
from transfer_surgery.transfer.wrapped_optimizers import WRAPPED


def test_gates_that_rest_at_the_end_of_a_cycle_are_not_reported() -> None:
    model = gated_mlp()
    set_gates(model, 0.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1000)
    for step in range(1000):
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == 799:
            before = log_alphas(model)
    assert (log_alphas(model) - before).abs().max() < 0.05  # what would have been reported


def test_rates_of_the_warmup_do_not_count_for_the_end_of_a_cycle() -> None:
    model = gated_mlp()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=1e-3, gamma_warmup=400)
    for step in range(600):
        optimizer.param_groups[-1]["lr"] = 0.1 if step < 400 else 0.005
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::transfer_surgery.FrozenGatesWarning")
@pytest.mark.parametrize(
    ("how", "most", "left"),
    [
        ({"gamma": 3.0}, 200, 50),  # they move
        ({"gamma": 1e-6}, 199, 0),  # step 200 reports them
        ({"transfer": TransferSchedule(450)}, 0, 0),
    ],
)
def test_what_a_step_remembers_is_forgotten_with_its_window(
    how: dict[str, Any], most: int, left: int
) -> None:
    model = gated_mlp()
    set_gates(model, 2.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, **how)
    watch, lengths = WRAPPED[optimizer].frozen, []
    for _ in range(450):
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(len(watch.rates))
    assert (max(lengths), lengths[-1]) == (most, left)
    assert bool(watch.before) == bool(left)


@pytest.mark.parametrize("start", [0.0, -8.0])
def test_gates_that_move_or_have_been_transferred_are_not_reported(start: float) -> None:
    model = gated_mlp()
    set_gates(model, start)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.0)
    for _ in range(201):
        optimizer.step()
        optimizer.zero_grad()


def warned(model: nn.Module, optimizer: Optimizer, steps: int = 200, scheduler: Any = None) -> str:
    """What the one warning says that must come in the last of these steps, and in none before."""
    for _ in range(steps - 1):
        plain(model, optimizer, False, 0)
        if scheduler is not None:
            scheduler.step()
    with pytest.warns(FrozenGatesWarning) as caught:
        plain(model, optimizer, False, 0)
    assert len(caught) == 1
    assert caught[0].filename.endswith("explicit_loss.py")  # `plain` calls step
    return str(caught[0].message)


@pytest.mark.parametrize(
    ("make", "gamma", "message"),
    [
        (
            lambda m: SGD(m.parameters(), lr=0.01),
            1.0,
            r"gates are frozen.* 200 steps.*sites 1, 3\).*TransferSchedule.*gate_weight_decay",
        ),
        (
            lambda m: AdamW(m.parameters(), eps=1e-4),
            0.1,
            r"gradients are below the optimizer's eps.*\(sites 1, 3\).*or a smaller eps",
        ),
        (
            lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.01),
            0.01,
            "move by weight decay alone",
        ),
    ],
)
def test_frozen_gates_are_reported_with_the_reason(make: Make, gamma: float, message: str) -> None:
    model = gated_mlp()
    assert re.search(message, warned(model, wrap_optimizer(make(model), model, gamma=gamma)))


def test_only_the_sites_that_do_not_move_are_named_and_only_once() -> None:
    model = gated_mlp()
    nn.init.constant_(model[1].log_alpha, 0.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.0)
    message = warned(model, optimizer)
    assert "(sites 3)" in message
    for _ in range(200):  # pytest makes a second warning an error
        optimizer.step()
        optimizer.zero_grad()


def test_a_learning_rate_that_ended_at_0_is_named() -> None:
    model = gated_mlp(width=40)
    set_gates(model, 4.0)
    optimizer = SGD(model.parameters(), lr=0.05)
    wrap_optimizer(optimizer, model, gamma=10.0)
    scheduler = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    message = warned(model, optimizer, 400, scheduler)
    assert "the learning rate of the gates is 0" in message


def test_gates_that_stay_are_seen_beside_gates_of_the_same_site_that_were_transferred() -> None:
    model = gated_mlp()
    set_gates(model, 8.0)
    with torch.no_grad():
        for gate in gates(model):
            gate[1:] = -30.0
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    wrap_optimizer(optimizer, model, gamma=0.1, gate_lr=0.01)
    message = warned(model, optimizer)
    # The transferred ones come up by weight decay: 0.6 of 30 in 200 steps.
    assert "weight decay alone" in message
    assert re.search(r"log_alpha changed by 0\.\d+ at most and is 7\.\d", message)


def test_gates_that_the_user_froze_are_not_reported() -> None:
    model = gated_mlp()
    model[1].log_alpha.requires_grad_(False)
    nn.init.constant_(model[3].log_alpha, 0.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.0)
    for _ in range(201):
        plain(model, optimizer, False, 0)


def test_gradients_that_a_fused_optimizer_unscaled_are_not_too_small() -> None:
    model = gated_mlp()
    set_gates(model, 3.0)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True, eps=1e-4)
    wrap_optimizer(optimizer, model, gamma=3.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(200):  # a FrozenGatesWarning would be an error here
        scaler.scale(task(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_adafactor_whose_eps_is_a_pair_passes_the_look_at_frozen_gates() -> None:
    model = gated_mlp()
    set_gates(model, 1.0)
    optimizer = wrap_optimizer(Adafactor(model.parameters(), lr=0.05), model, gamma=1.0)
    for _ in range(200):
        plain(model, optimizer, False, 0)


# ---- losses that are not finite


@pytest.mark.parametrize("way", ["step", "closure"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": TransferSchedule(3, start=0)}])
def test_a_loss_that_is_not_finite_stops_before_anything_is_updated(
    how: dict[str, Any], bias: bool, way: str
) -> None:
    model = gated_mlp(bias=bias)
    optimizer = wrap_optimizer(Adam(model.parameters()), model, **how)
    before = copy.deepcopy(model)

    def evaluate() -> Tensor:
        loss = task(model, 0) * math.nan
        loss.backward()
        return loss

    name = "0.bias" if bias else "0.weight"
    message = rf"step 1: .* {name} is not finite \(nothing was updated\)\. Lower the learning rate"
    given = [evaluate] if way == "closure" else []
    if way == "step":
        evaluate()
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step(*given)
    assert_same_weights(model, before, rtol=0, atol=0)
    assert optimizer.param_groups[-1]["transfer_step"] == 0


def test_a_trial_of_lbfgs_that_is_not_finite_says_that_the_weights_are_a_trial() -> None:
    model = mid_transfer(gated_mlp())
    optimizer = wrap_optimizer(torch.optim.LBFGS(model.parameters()), model, gamma=GAMMA)
    factors = iter([1.0, math.nan])

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = task(model, 0) * next(factors)
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="evaluation 2 of the closure, the weights are"):
        optimizer.step(evaluate)


def test_large_but_finite_gradients_pass() -> None:
    model = gated_mlp()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.0), model, gamma=GAMMA)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e38)
    optimizer.step()
