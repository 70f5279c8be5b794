"""`wrap_optimizer` on optimizers and models that others have had their hands on."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from tests.helpers.explicit_loss import (
    assert_transferred,
    gated_mlp,
    gates,
    plain,
    refused,
    set_gates,
    task,
)
from transfer_surgery import TransferSchedule, pause_transfer, structural_risk, wrap_optimizer
from transfer_surgery.units import gated_activations

SCHEDULE = TransferSchedule(10, start=0, end=1.0)


class Derived(SGD):
    """A subclass in the usual way, whose ``step`` calls that of its base class."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("way", ["plain", "closure"])
def test_a_step_that_calls_the_one_of_its_base_class_counts_once(way: str) -> None:
    SGD([torch.zeros(1)], lr=0.1)  # from here on SGD.step itself runs hooks
    model = gated_mlp()
    optimizer = wrap_optimizer(Derived(model.parameters(), lr=0.01), model, transfer=SCHEDULE)
    for step in range(1, 6):
        if way == "closure":
            optimizer.step(lambda: task(model, 0))
        else:
            plain(model, optimizer, False, step)
    assert optimizer.param_groups[-1]["transfer_step"] == 5
    assert structural_risk(model, "mean").item() == pytest.approx(SCHEDULE.budget(5), abs=1e-3)


def test_steps_go_on_counting_after_one_that_failed() -> None:
    model = gated_mlp()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, transfer=SCHEDULE)

    def fail() -> Any:
        raise MemoryError("as a GPU that is full")

    with pytest.raises(MemoryError):
        optimizer.step(fail)
    plain(model, optimizer, False, 0)
    assert optimizer.param_groups[-1]["transfer_step"] == 1


def test_a_group_of_the_gates_alone_becomes_theirs_with_its_settings() -> None:
    model = gated_mlp()
    weights = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    groups = [{"params": gates(model), "lr": 0.3, "weight_decay": 0.0}, {"params": weights}]
    optimizer = AdamW(groups, lr=0.01)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["transfer_step"] == 0


def test_groups_that_held_nothing_but_gates_are_gone() -> None:
    model = gated_mlp()
    first, second = (unit.log_alpha for _, unit in gated_activations(model))
    weights = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    optimizer = AdamW([{"params": [first]}, {"params": [*weights, second]}])
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 2]
    plain(model, optimizer, False, 0)
    get_state_dict(model, optimizer)


class Demanding(SGD):
    """Wants a key in each group, as Muon with an auxiliary Adam does."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "use_muon" not in param_group:
            raise KeyError("use_muon")
        super().add_param_group(param_group)


def test_where_no_group_can_be_added_the_optimizer_is_as_it_was() -> None:
    model = gated_mlp()
    groups = [{"params": list(model.parameters()), "use_muon": False}]
    refused(KeyError, "use_muon", model, Demanding(groups, lr=0.1), transfer=SCHEDULE)


def test_groups_that_fitted_targets_had_left_are_there_again() -> None:
    class Full(SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if len(getattr(self, "param_groups", [])) == 2 and self.state:
                raise ValueError("full")
            super().add_param_group(param_group)

    model = gated_mlp()
    targets = [[*unit.add_fitted_target().parameters()] for _, unit in gated_activations(model)]
    others = [p for name, p in model.named_parameters() if "fitted" not in name]
    optimizer = Full([{"params": own} for own in (others, *targets)], lr=0.1, momentum=0.9)
    task(model, 0).backward()
    optimizer.step()
    # The targets get a group in place of their two, and the gates none.
    refused(ValueError, "full", model, optimizer, transfer=SCHEDULE)


def test_an_optimizer_without_step_hooks_is_refused() -> None:
    class Foreign(Optimizer):
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params), "lr": 0.1}]
            self.defaults = {"lr": 0.1}

    model = gated_mlp()
    refused(ValueError, "runs no step hooks", model, Foreign(model.parameters()), gamma=1.0)


class Outer(Optimizer):
    """Keeps the optimizer that it wraps under a name of its own, as opacus does."""

    def __init__(self, inner: Optimizer, name: str) -> None:
        setattr(self, name, inner)
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "original_optimizer"])
def test_of_an_optimizer_around_another_the_inner_one_is_hooked(name: str) -> None:
    model = gated_mlp()
    outer = Outer(SGD(model.parameters(), lr=0.1), name)
    assert wrap_optimizer(outer, model, transfer=SCHEDULE) is outer
    for step in range(10):
        plain(model, outer, False, step)
    pause_transfer(outer)
    assert outer.param_groups[-1]["transfer_step"] == 10
    assert_transferred(model)


def test_frozen_and_flattened_gates_are_refused() -> None:
    model = gated_mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as PEFT does
    refused(ValueError, "every gate is frozen, as after", model, optimizer, transfer=SCHEDULE)
    model = gated_mlp()
    model[3].gate.log_alpha = nn.Parameter(torch.zeros(0))  # a rank's part under FSDP 1
    message = r"3: log_alpha has the shape \(0,\) instead of \(6,\).*use fully_shard"
    refused(ValueError, message, model, SGD(model.parameters(), lr=0.1), transfer=SCHEDULE)


def test_a_learning_rate_for_the_gates_does_not_become_that_of_the_weights() -> None:
    model = gated_mlp()
    optimizer = AdamW(model.parameters(), lr=0.01)
    lr_scheduler.StepLR(optimizer, 1)
    wrap_optimizer(optimizer, model, gamma=0.5)  # the gates stay in the one group
    other, again = copy.deepcopy((model, optimizer))
    message = "gate_lr: the gates share a parameter group with weights"
    refused(ValueError, message, other, again, gamma=0.5, gate_lr=0.7)


def test_gates_of_another_conversion_are_refused() -> None:
    model = gated_mlp()
    optimizer = copy.deepcopy(wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=1.0))
    refused(ValueError, "holds no parameter", gated_mlp(), optimizer, gamma=1.0)
    other, again = copy.deepcopy((model, optimizer))
    again.param_groups = copy.deepcopy(optimizer.param_groups)
    again.param_groups[0]["params"] = list(other[0].parameters())
    refused(ValueError, "wrapped for other gates than the model", other, again, gamma=1.0)


def test_a_resumed_schedule_of_gates_that_are_close_together_does_not_count_as_restarted() -> None:
    model = gated_mlp(width=20)
    set_gates(model, 8.0)
    schedule = TransferSchedule(20)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.0), model, transfer=schedule)
    for _ in range(13):
        plain(model, optimizer, False, 0)
    assert_transferred(model)
    other = copy.deepcopy(model)
    again = wrap_optimizer(SGD(other.parameters(), lr=0.0), other, transfer=schedule)
    again.load_state_dict(optimizer.state_dict())
    plain(other, again, False, 0)
    assert structural_risk(other, "mean").item() == pytest.approx(schedule.budget(14), abs=1e-3)


def test_freezing_a_stage_that_is_done_does_not_hurry_the_next() -> None:
    model = gated_mlp(width=40)
    schedule = TransferSchedule(40, start=0, end=1.0, shape="linear", order=["1", "3"])
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    for step in range(1, 41):
        plain(model, optimizer, False, step)
        if step == 21:
            assert bool((model[1].gate.predict() == 0).all())
            model[1].log_alpha.requires_grad_(False)
        asked = schedule.budget(step)
        assert structural_risk(model, "mean").item() == pytest.approx(asked, abs=2e-3)
    assert math.isclose(asked, 0)
