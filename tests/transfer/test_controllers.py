"""Gates follow a schedule, which pauses and warns; the warm-up of gamma."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer, lr_scheduler

from tests.helpers.explicit_loss import (
    GAMMA,
    assert_loop_reaches_the_budget,
    assert_same_weights,
    assert_transferred,
    closure,
    gated_mlp,
    log_alphas,
    mid_transfer,
    plain,
    task,
)
from transfer_surgery import (
    ScheduleEndedWarning,
    TransferRestartedWarning,
    TransferSchedule,
    pause_transfer,
    resume_transfer,
    structural_risk,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations


def test_lbfgs_follows_the_schedule_too() -> None:
    def make(model: nn.Module) -> Optimizer:
        return LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")

    assert_loop_reaches_the_budget(make, closure)


def test_gates_that_the_user_froze_stay() -> None:
    model = gated_mlp()
    frozen, free = (unit.gate for _, unit in gated_activations(model))
    frozen.log_alpha.requires_grad_(False)
    before = frozen.log_alpha.clone()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(4, end=0.5))
    for seed in range(3):
        plain(model, optimizer, False, seed)
    assert torch.equal(frozen.log_alpha, before)
    assert bool((free.predict() == 0).all())


@pytest.mark.parametrize("kind", ["line", "copy"])
def test_a_linear_schedule_gives_the_papers_line_and_copy(kind: str) -> None:
    model = gated_mlp(kind)
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = TransferSchedule(10, start=0, end=1.0, shape="linear")
    wrap_optimizer(optimizer, model, transfer=schedule)
    for step in range(1, 11):
        plain(model, optimizer, False, step)
        expected = 1 - step / 10 if kind == "line" else float(step < 5)
        for _, unit in gated_activations(model):
            torch.testing.assert_close(unit.gate.predict(), torch.full((6,), expected))


# ---- pauses


def test_in_a_pause_the_budget_is_held_while_the_weights_train_on() -> None:
    model = gated_mlp(width=20)
    schedule = TransferSchedule(20, start=0, end=1.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    for step in range(8):
        plain(model, optimizer, False, step)
    pause_transfer(optimizer)
    assert optimizer.state_dict()["param_groups"][-1]["transfer_paused"]  # checkpoints know it
    weight = model[0].weight.detach().clone()
    gates = log_alphas(model)
    for step in range(5):
        plain(model, optimizer, False, step)
        assert structural_risk(model, "mean").item() == pytest.approx(schedule.budget(8), abs=1e-3)
    assert not torch.equal(model[0].weight, weight)
    assert not torch.equal(log_alphas(model), gates)  # they still learn who goes first
    resume_transfer(optimizer)
    for step in range(12):
        plain(model, optimizer, False, step)
        expected = schedule.budget(9 + step)
        assert structural_risk(model, "mean").item() == pytest.approx(expected, abs=1e-3)
    assert optimizer.param_groups[-1]["transfer_step"] == 20


def test_only_schedules_can_be_paused() -> None:
    model = gated_mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="only a transfer schedule can be paused"):
        pause_transfer(optimizer)
    wrap_optimizer(optimizer, model, gamma=1.0)
    with pytest.raises(ValueError, match="only a transfer schedule can be paused"):
        resume_transfer(optimizer)


def test_a_schedule_that_begins_anew_on_transferred_gates_says_so_once() -> None:
    model = gated_mlp(width=20)
    schedule = TransferSchedule(10, start=0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    for step in range(8):
        plain(model, optimizer, False, step)
    saved = copy.deepcopy(optimizer.state_dict())
    for resumed in (True, False):
        other = copy.deepcopy(model)
        again = wrap_optimizer(SGD(other.parameters(), lr=0.1), other, transfer=schedule)
        if resumed:  # pytest makes a warning an error
            again.load_state_dict(saved)
        else:
            message = "100% of the gates were transferred already, .* load its optimizer's state"
            with pytest.warns(TransferRestartedWarning, match=message):
                plain(other, again, False, 0)
        plain(other, again, False, 1)


@pytest.mark.parametrize("kind", ["hard_concrete", "line"])
def test_a_swap_that_the_schedule_undoes_is_reported_and_can_be_kept(kind: str) -> None:
    model = gated_mlp(kind, width=20)
    schedule = TransferSchedule(10, start=0, order="front_to_back")
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    plain(model, optimizer, False, 0)
    swap_targets(model, include="3")  # the site whose turn comes last
    with pytest.warns(TransferRestartedWarning, match=r"gates at 3, .* step 2, .* for good, "):
        plain(model, optimizer, False, 0)
    assert (model[3].gate.predict() == 1).all()
    if kind == "hard_concrete":
        model[3].log_alpha.requires_grad_(False)
        swap_targets(model, include="3")
    for step in range(7):  # pytest makes a warning an error
        plain(model, optimizer, False, step)
        if kind == "hard_concrete":
            assert (model[3].gate.predict() == 0).all()
    swap_targets(model)  # at the end nothing is undone
    optimizer.step()


@pytest.mark.parametrize("scheduler", [False, True])
def test_running_past_the_end_warns_once_at_the_line_that_called_step(scheduler: bool) -> None:
    model = gated_mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(2, start=0))
    if scheduler:
        lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    optimizer.step()
    message = r"step 3 .* of 2 steps.*total_steps counts"
    with pytest.warns(ScheduleEndedWarning, match=message) as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()  # once is enough: pytest makes a second warning an error
    assert_transferred(model)


# ---- gamma


def test_gamma_rises_linearly_over_the_warm_up() -> None:
    model = mid_transfer(gated_mlp())
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=GAMMA, gamma_warmup=4)
    explicit = SGD(reference.parameters(), lr=0.1)
    for step, share in enumerate([0.25, 0.5, 0.75, 1.0, 1.0, 1.0]):
        task(model, step).backward()
        wrapped.step()
        wrapped.zero_grad()
        (task(reference, step) + share * GAMMA * structural_risk(reference)).backward()
        explicit.step()
        explicit.zero_grad()
    assert_same_weights(model, reference)
