"""Pauses, warm-up and the automatic gamma."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer, lr_scheduler

from tests.helpers.wrapped import (
    GAMMA,
    assert_same_weights,
    log_alphas,
    mixed_network,
    network,
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
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations

# ---- pauses


def test_in_a_pause_the_budget_is_held_while_the_weights_train_on() -> None:
    model = network(width=20)
    schedule = TransferSchedule(20, start=0, end=1.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    for step in range(8):
        plain(model, optimizer, False, step)
    pause_transfer(optimizer)
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


def test_a_pause_survives_a_checkpoint() -> None:
    model = network()
    make = {"transfer": TransferSchedule(10, start=0)}
    optimizer = wrap_optimizer(Adam(model.parameters()), model, **make)
    plain(model, optimizer, False, 0)
    pause_transfer(optimizer)
    other = copy.deepcopy(model)
    again = wrap_optimizer(Adam(other.parameters()), other, **make)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain(other, again, False, 0)
    assert again.param_groups[-1]["transfer_step"] == 1


def test_only_schedules_can_be_paused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="only a transfer schedule can be paused"):
        pause_transfer(optimizer)
    wrap_optimizer(optimizer, model, gamma=1.0)
    with pytest.raises(ValueError, match="only a transfer schedule can be paused"):
        resume_transfer(optimizer)


def test_a_schedule_that_begins_anew_on_transferred_gates_says_so_once() -> None:
    model = network(width=20)
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


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("gamma", [None, "auto"])
def test_warnings_point_to_the_line_that_called_step(gamma: Any, scheduler: bool) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(2, start=0), gamma=gamma)
    if scheduler:
        lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    optimizer.step()
    with pytest.warns(ScheduleEndedWarning) as caught:
        optimizer.step()
    assert caught[0].filename == __file__


# ---- gamma


def test_gamma_rises_linearly_over_the_warm_up() -> None:
    model = mixed_network()
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.0, "gamma_warmup": -1}, "gamma_warmup=-1: steps over which"),
        ({"transfer": TransferSchedule(9), "gamma_warmup": 3}, "has its own start="),
        ({"gamma": "auto"}, "give exactly one of"),
        ({"gamma": "often"}, "gamma=often: give a finite number"),
        (
            {"gamma": "auto", "transfer": TransferSchedule(9, order="front_to_back")},
            "order='front_to_back': gamma='auto' is one weight",
        ),
    ],
)
def test_arguments_of_gamma_that_do_not_fit_are_errors(
    arguments: dict[str, Any], message: str
) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        wrap_optimizer(optimizer, model, **arguments)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("lr", [0.001, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_automatic_gamma_comes_near_the_schedule_at_any_learning_rate(
    lr: float, momentum: float
) -> None:
    model = network(width=64)
    schedule = TransferSchedule(300)
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
    wrap_optimizer(optimizer, model, gamma="auto", transfer=schedule)
    distances = []
    for step in range(1, 301):
        plain(model, optimizer, False, step)
        distances.append(abs(structural_risk(model, "mean").item() - schedule.budget(step)))
    assert max(distances) < 0.25
    assert all((unit.gate.predict() == 0).all() for _, unit in gated_activations(model))


def test_the_automatic_gamma_survives_a_warm_up_of_the_learning_rate_from_0() -> None:
    model = network(width=64)
    schedule = TransferSchedule(300, start=0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrap_optimizer(optimizer, model, gamma="auto", transfer=schedule)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    for step in range(1, 301):
        plain(model, optimizer, False, step)
        scheduler.step()
        distance = structural_risk(model, "mean").item() - schedule.budget(step)
        assert abs(distance) < 0.3


@pytest.mark.parametrize("make", [SGD, Adam])
def test_steps_of_the_automatic_gamma_equal_those_of_the_explicit_loss(make: Any) -> None:
    model = mixed_network()
    reference = copy.deepcopy(model)
    wrapped = make(model.parameters(), lr=0.01)
    wrap_optimizer(wrapped, model, gamma="auto", transfer=TransferSchedule(10, start=0))
    explicit = make(reference.parameters(), lr=0.01)
    seen = []

    def closure() -> Any:
        wrapped.zero_grad()
        loss = task(model, step)
        loss.backward()
        return loss

    for step in range(4):
        risk = structural_risk(model).item()
        with_risk: Any = wrapped.step(closure)  # the loss with the risk tells which gamma it was
        gamma = (with_risk.item() - task(reference, step).item()) / risk
        seen.append(gamma)
        explicit.zero_grad()
        (task(reference, step) + gamma * structural_risk(reference)).backward()
        explicit.step()
    assert_same_weights(model, reference, rtol=1e-3, atol=1e-5)
    assert len({round(gamma, 3) for gamma in seen}) == 4


def test_the_automatic_gamma_is_part_of_the_checkpoint() -> None:
    def start() -> tuple[nn.Module, Optimizer]:
        model = mixed_network()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = TransferSchedule(10, start=0)
        return model, wrap_optimizer(optimizer, model, gamma="auto", transfer=schedule)

    torch.manual_seed(0)
    model, optimizer = start()
    for step in range(3):
        plain(model, optimizer, False, step)
    other, again = start()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        plain(model, optimizer, False, step)
        plain(other, again, False, step)
    assert_same_weights(model, other, rtol=0, atol=0)


def test_lbfgs_takes_an_automatic_gamma() -> None:
    ends = []
    for gamma in (True, False):
        torch.manual_seed(0)
        model = mixed_network()
        optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
        if gamma:
            wrap_optimizer(optimizer, model, gamma="auto", transfer=TransferSchedule(10, start=0))

        def closure(model: nn.Module = model, optimizer: LBFGS = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = task(model, 0)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        ends.append(structural_risk(model, "mean").item())
    assert ends[0] < ends[1]
