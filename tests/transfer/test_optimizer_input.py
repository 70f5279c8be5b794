"""What `wrap_optimizer` refuses, and the schedulers and optimizers that were there before it."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from tests.helpers.explicit_loss import (
    GAMMA,
    SCHEDULE,
    assert_same_weights,
    closure,
    gated_mlp,
    log_alphas,
    mid_transfer,
    plain,
    refused,
)
from transfer_surgery import TransferSchedule, wrap_optimizer


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"exactly one of gamma= .* and transfer=TransferSchedule"),
        ({"gamma": 1.0, "transfer": SCHEDULE}, ValueError, "exactly one of gamma="),
        ({"gamma": -1.0}, ValueError, "gamma=-1.0: give a finite number"),
        ({"gamma": math.inf}, ValueError, "gamma=inf"),
        ({"gamma": "often"}, TypeError, "gamma is a str, and has to be float"),
        ({"gamma": 1.0, "gamma_warmup": -1}, ValueError, "gamma_warmup=-1: give a number of opt"),
        ({"transfer": SCHEDULE, "gamma_warmup": 3}, ValueError, "a transfer schedule has its own"),
        ({"gamma": 1.0, "reduction": "max"}, ValueError, "unknown reduction 'max'"),
        ({"transfer": 100}, TypeError, "transfer is a int, and has to be .*TransferSchedule"),
        (
            {"transfer": SCHEDULE, "reduction": "mean"},
            ValueError,
            "reduction='mean' .* Leave it out",
        ),
        ({"gamma": 1.0, "gate_lr": -0.1}, ValueError, "gate_lr=-0.1: give a finite number"),
        ({"gamma": 1.0, "gate_weight_decay": math.nan}, ValueError, "gate_weight_decay=nan"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = gated_mlp()
    refused(error, message, model, SGD(model.parameters(), lr=0.1), **arguments)


def test_gates_without_parameters_take_a_full_schedule_only() -> None:
    model = gated_mlp("line")
    for arguments, message in (
        ({"gamma": 1.0}, "gates of the kind 'line' have no parameters .* transfer="),
        ({"transfer": SCHEDULE, "gate_lr": 0.1}, "gate_lr: these gates have no parameters"),
        ({"transfer": TransferSchedule(9, fraction=0.5)}, "'line' all go together: use fraction=1"),
    ):
        refused(ValueError, message, model, SGD(model.parameters(), lr=0.1), **arguments)


def test_optimizers_that_do_not_fit_are_errors() -> None:
    model = gated_mlp()
    refused(ValueError, r"call convert\(model", nn.Linear(2, 2), SGD(model.parameters()), gamma=1.0)
    refused(TypeError, "Sequential is not a torch.optim.Optimizer", model, model, gamma=1.0)
    other = SGD(gated_mlp().parameters(), lr=0.1)
    refused(ValueError, "holds no parameter of this Sequential", model, other, gamma=1.0)
    lbfgs = torch.optim.LBFGS(model.parameters())
    refused(ValueError, "gate_lr: LBFGS allows only one", model, lbfgs, gamma=1.0, gate_lr=0.1)
    rprop = torch.optim.Rprop(model.parameters())
    message = "gate_weight_decay: Rprop has no weight_decay"
    refused(ValueError, message, model, rprop, gamma=1.0, gate_weight_decay=0.1)
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    refused(ValueError, "Muon updates matrices .* and wrap that one", model, muon, gamma=1.0)
    sparse = torch.optim.SparseAdam(model.parameters())
    refused(ValueError, "SparseAdam takes sparse .* and wrap that one", model, sparse, gamma=1.0)
    wrapped = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=1.0)
    refused(ValueError, "wrapped already.*Build a new optimizer", model, wrapped, gamma=1.0)


@pytest.mark.parametrize("why", ["gates not held", "gate_lr"])
def test_a_scheduler_that_was_created_before_is_an_error_where_a_group_is_needed(why: str) -> None:
    model = gated_mlp()
    others = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    optimizer = SGD(others if why == "gates not held" else model.parameters(), lr=0.1)
    lr_scheduler.StepLR(optimizer, 1)
    message = "scheduler was created .* Create it after wrap_optimizer"
    settings = {"gate_lr": 0.1} if why == "gate_lr" else {}
    refused(ValueError, message, model, optimizer, gamma=1.0, **settings)


@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": SCHEDULE}])
def test_with_a_scheduler_that_was_created_before_gates_stay_in_their_group(
    how: dict[str, Any],
) -> None:
    model = mid_transfer(gated_mlp())
    weights = [p for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [p for n, p in model.named_parameters() if p.dim() <= 1]
    optimizer = SGD([{"params": weights}, {"params": vectors, "lr": 0.01}], lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    reference = copy.deepcopy(model)
    wrap_optimizer(optimizer, model, **how)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 5]
    plain(model, optimizer, False, 0)
    scheduler.step()
    assert optimizer.param_groups[1]["transfer_step"] == 1
    if "gamma" in how:
        vectors = [p for n, p in reference.named_parameters() if p.dim() <= 1]
        weights = [p for n, p in reference.named_parameters() if p.dim() > 1]
        explicit = SGD([{"params": weights}, {"params": vectors, "lr": 0.01}], lr=0.1)
        plain(reference, explicit, True, 0)
        assert_same_weights(model, reference)


def test_a_scheduler_that_was_created_before_still_works_where_no_group_is_added() -> None:
    model = gated_mlp("line")
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(model, optimizer, False, 0)
        scheduler.step()


def test_lbfgs_built_before_convert_takes_the_gates_into_its_group() -> None:
    model = mid_transfer(gated_mlp())
    others = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    optimizer = torch.optim.LBFGS(others, max_iter=2)
    closure(model, optimizer, True, 0)
    before = log_alphas(model)
    wrap_optimizer(optimizer, model, gamma=GAMMA)
    closure(model, optimizer, False, 0)
    assert not torch.equal(log_alphas(model), before)
