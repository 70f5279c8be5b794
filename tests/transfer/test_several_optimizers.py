"""Gates move once per step: several optimizers, units that came or went, skipped steps."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler

from tests.helpers.explicit_loss import (
    GAMMA,
    assert_transferred,
    gated_mlp,
    gates,
    log_alphas,
    mean_probability,
    mid_transfer,
    plain,
    refused,
    task,
)
from transfer_surgery import TransferSchedule, bake, convert, revert, wrap_optimizer
from transfer_surgery.transfer.skipped_steps import SkippedSteps

SCHEDULE = TransferSchedule(10, start=0, end=1.0)
X = torch.zeros(2, 3)


# ---- several optimizers of one model


def test_optimizers_of_two_halves_cannot_both_move_all_gates() -> None:
    model = gated_mlp()
    first, second = (SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    wrap_optimizer(first, model, gamma=GAMMA)
    message = r"another optimizer \(SGD\) .* moves the gates of 1, 3: they would move twice"
    refused(ValueError, message, model, second, gamma=GAMMA)


def test_each_half_may_have_its_own_optimizer() -> None:
    model = nn.Sequential(gated_mlp(), nn.Linear(2, 3), gated_mlp())
    optimizers = [
        wrap_optimizer(SGD(part.parameters(), lr=0.1), part, transfer=SCHEDULE)
        for part in (model[0], model[2])
    ]
    for step in range(1, 11):
        task(model, step).backward()
        for part, optimizer in zip((model[0], model[2]), optimizers, strict=True):
            optimizer.step()
            assert mean_probability(part) == pytest.approx(SCHEDULE.budget(step), abs=1e-3)
        model.zero_grad()
    assert_transferred(model)


def test_a_slice_of_a_network_that_is_converted_again_is_noticed() -> None:
    """The slice is a module of its own, which keeps the old units."""
    model = gated_mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_optimizer(optimizer, model[:2], transfer=SCHEDULE)
    plain(model, optimizer, False, 0)
    convert(revert(model), example_input=X)
    with pytest.warns(UserWarning, match="gates at 1 have been taken out .* make a new optimizer"):
        plain(model, optimizer, False, 1)
    plain(model, optimizer, False, 2)


def test_an_optimizer_that_is_gone_does_not_count() -> None:
    model = gated_mlp()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, gamma=GAMMA)
    lr_scheduler.StepLR(optimizer, 1)  # puts the optimizer into a reference cycle
    del optimizer
    wrap_optimizer(SGD(model[2].parameters(), lr=0.1), model, gamma=GAMMA)


def test_a_new_optimizer_of_the_same_parameters_replaces_the_earlier_one() -> None:
    model = mid_transfer(gated_mlp())
    earlier = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=SCHEDULE)
    later = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=SCHEDULE)
    before = log_alphas(model)
    with pytest.warns(UserWarning, match="another optimizer was wrapped for the same gates since"):
        earlier.step()
    earlier.step()  # once is enough: pytest makes a second warning an error
    assert torch.equal(log_alphas(model), before)
    later.step()
    assert mean_probability(model) == pytest.approx(SCHEDULE.budget(1), abs=1e-3)


# ---- units that came or went since the optimizer was wrapped


@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": SCHEDULE}])
def test_a_model_that_was_converted_again_needs_a_new_optimizer(how: dict[str, Any]) -> None:
    model = gated_mlp()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, **how)
    revert(model)
    convert(model, "snake", example_input=X)
    with pytest.raises(RuntimeError, match=r"converted again .* Make a new optimizer and call"):
        optimizer.step()
    again = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=SCHEDULE)
    for step in range(10):
        plain(model, again, False, step)
    assert_transferred(model)


def test_a_part_that_was_baked_and_converted_again_needs_a_new_optimizer() -> None:
    model = nn.Sequential(gated_mlp(), gated_mlp())
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=SCHEDULE)
    bake(model[0])
    optimizer.step()  # the other half is still there
    convert(model[0], "snake", example_input=X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="converted again"):
            optimizer.step()


@pytest.mark.parametrize("leave", [bake, revert])
def test_weights_train_on_after_the_units_are_gone(leave: Any) -> None:
    model = gated_mlp()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=SCHEDULE)
    for step in range(10):
        plain(model, optimizer, False, step)
    leave(model)
    before = model[0].weight.detach().clone()
    plain(model, optimizer, False, 0)
    assert not torch.equal(model[0].weight, before)
    assert optimizer.param_groups[-1]["transfer_step"] == 10


# ---- steps that a GradScaler skips


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_do_not_advance_the_schedule(fused: bool) -> None:
    model = gated_mlp()
    optimizer = Adam(model.parameters(), lr=0.01, fused=fused)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(6):
        scaler.scale(task(model, step) * (math.inf if step < 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.param_groups[-1]["transfer_step"] == 3
    assert mean_probability(model) == pytest.approx(SCHEDULE.budget(3), abs=1e-3)


class _Late:
    """An event that has not happened when it is asked for the first time."""

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None:
        self.asked = 2


def test_a_skipped_step_counts_once_it_is_known_or_when_a_checkpoint_waits_for_it() -> None:
    skipped = SkippedSteps()
    skipped.pending.extend((torch.tensor(found), _Late()) for found in (1.0, 0.0, 1.0))
    assert skipped.take() == 0  # nothing has arrived, and nobody waits
    assert skipped.take() == 1
    assert skipped.take(wait=True) == 1
    assert not skipped.pending


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_skipped_steps_on_a_gpu_are_counted_without_a_synchronisation() -> None:
    model = gated_mlp().cuda()
    optimizer = Adam(model.parameters(), lr=0.01, fused=True)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    scaler = torch.amp.GradScaler("cuda")
    for step in range(8):
        loss = model(torch.randn(8, 3, device="cuda")).square().mean()
        scaler.scale(loss * (math.inf if 2 <= step < 5 else 1.0)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.state_dict()["param_groups"][-1]["transfer_step"] == 5
    assert optimizer.param_groups[-1]["transfer_step"] == 5
    assert all(gate.isfinite().all() for gate in gates(model))
