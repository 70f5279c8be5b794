"""`wrap_optimizer`: the gradient of the risk, and an optimizer that stays the user's.

That steps equal those of the explicit loss is tested by `test_loops`.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from tests.helpers.explicit_loss import (
    GAMMA,
    SCHEDULE,
    assert_same_weights,
    closure_of,
    gated_mlp,
    gates,
    mid_transfer,
    plain,
    task,
)
from transfer_surgery import TransferSchedule, structural_risk, wrap_optimizer


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_steps_equal_those_of_the_explicit_loss(line_search: str | None) -> None:
    def make(params: Any) -> Optimizer:
        return torch.optim.LBFGS(params, lr=0.5, max_iter=5, line_search_fn=line_search)

    model = mid_transfer(gated_mlp())
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(make(model.parameters()), model, gamma=GAMMA)
    explicit = make(reference.parameters())
    for _ in range(2):
        losses = [
            optimizer.step(closure_of(net, optimizer, net is reference, 0))
            for net, optimizer in ((model, wrapped), (reference, explicit))
        ]
        torch.testing.assert_close(losses[0], losses[1].detach() if line_search else losses[1])
    assert_same_weights(model, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "neurons"])
def test_reduction_is_that_of_structural_risk(reduction: str) -> None:
    model = mid_transfer(gated_mlp())
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(SGD(model.parameters(), lr=1), model, gamma=2, reduction=reduction)
    task(model, 0).backward()
    wrapped.step()
    explicit = SGD(reference.parameters(), lr=1)
    (task(reference, 0) + 2 * structural_risk(reference, reduction)).backward()
    explicit.step()
    assert_same_weights(model, reference)


def test_an_optimizer_that_maximizes_gets_the_risk_with_the_other_sign() -> None:
    model = mid_transfer(gated_mlp())
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(SGD(model.parameters(), lr=0.1, maximize=True), model, gamma=GAMMA)
    (-task(model, 0)).backward()
    wrapped.step()
    plain(reference, SGD(reference.parameters(), lr=0.1), True, 0)
    assert_same_weights(model, reference)


@pytest.mark.parametrize("returned", ["tensor", "float", "none"])
def test_closure_returns_the_loss_with_the_risk(returned: str) -> None:
    model = mid_transfer(gated_mlp())
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=GAMMA)
    expected = (task(model, 0) + GAMMA * structural_risk(model)).item()

    def evaluate() -> Any:
        loss = task(model, 0)
        loss.backward()
        loss = loss.detach()
        return {"tensor": loss, "float": loss.item(), "none": None}[returned]

    result: Any = optimizer.step(evaluate)
    if returned == "none":
        assert result is None
    else:
        assert isinstance(result, Tensor if returned == "tensor" else float)
        assert float(result) == pytest.approx(expected)


# ---- the optimizer stays the user's


@pytest.mark.parametrize("when", ["before convert", "after convert"])
def test_gates_get_the_last_group_and_the_state_of_their_parameters_stays(when: str) -> None:
    model = mid_transfer(gated_mlp())
    others = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    params = others if when == "before convert" else list(model.parameters())
    optimizer = Adam(
        [{"params": params[:3], "lr": 0.02, "weight_decay": 0.0}, {"params": params[3:]}],
        lr=0.01,
        weight_decay=0.1,
    )
    task(model, 0).backward()
    optimizer.step()
    state = {p: optimizer.state[p] for p in params}

    wrapped = wrap_optimizer(optimizer, model, gamma=GAMMA)
    assert wrapped is optimizer
    assert isinstance(wrapped, torch.optim.Optimizer)
    assert type(wrapped) is Adam
    *rest, own = wrapped.param_groups
    assert own["params"] == gates(model)
    assert own["lr"] == 0.02
    assert own["weight_decay"] == 0.1
    assert own["betas"] == (0.9, 0.999)
    assert {p for group in rest for p in group["params"]} == set(others)
    assert all(wrapped.state[p] is state[p] for p in params)
    task(model, 1).backward()
    wrapped.step()


@pytest.mark.parametrize(
    ("how", "weight_decay"),
    [
        ({"gamma": 1.0}, 0.1),
        ({"transfer": SCHEDULE}, 0.0),
        ({"gamma": 1.0, "gate_weight_decay": 0.5}, 0.5),
        ({"transfer": SCHEDULE, "gate_weight_decay": 0.5}, 0.5),
    ],
)
def test_weight_decay_of_the_gates(how: dict[str, Any], weight_decay: float) -> None:
    model = gated_mlp()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    wrap_optimizer(optimizer, model, gate_lr=0.7, **how)
    assert optimizer.param_groups[-1]["weight_decay"] == weight_decay
    assert optimizer.param_groups[-1]["lr"] == 0.7
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_with_named_parameters_stay_named() -> None:
    model = gated_mlp()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    first, own = optimizer.param_groups
    assert own["param_names"] == ["1.gate.log_alpha", "3.gate.log_alpha"]
    names = {name: p for name, p in model.named_parameters() if name not in own["param_names"]}
    assert dict(zip(first["param_names"], first["params"], strict=True)) == names


def test_a_learning_rate_tensor_is_not_shared_with_the_gates() -> None:
    model = gated_mlp()
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    lr_scheduler.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.5])
    first, own = (float(group["lr"]) for group in optimizer.param_groups)
    assert (first, own) == (pytest.approx(0.1), pytest.approx(0.05))


# By a factor, in a closed form, with the momentum, by a measure, one after the other, of averages.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.StepLR(o, 1, 0.5), lr_scheduler.StepLR(o, 1, 0.1)], [1]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_the_gates_learning_rate_with_the_others(name: str) -> None:
    model = gated_mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrap_optimizer(optimizer, model, transfer=SCHEDULE)
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for seed in range(3):
        plain(model, optimizer, False, seed)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        first, own = (group["lr"] for group in optimizer.param_groups)
        assert own == pytest.approx(first)
        seen.add(own)
    assert len(seen) > 1
    assert optimizer.param_groups[-1]["transfer_step"] == 3


def test_a_copy_or_pickle_has_no_hooks_and_goes_on_once_it_is_wrapped_again() -> None:
    model = mid_transfer(gated_mlp())
    optimizer = wrap_optimizer(Adam(model.parameters()), model, transfer=TransferSchedule(6))
    plain(model, optimizer, False, 0)
    lr_scheduler.StepLR(optimizer, 1)
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for again, other in copies:
        wrap_optimizer(other, again, transfer=TransferSchedule(6), gate_lr=0.5)
        assert len(other.param_groups) == 2
        assert other.param_groups[-1]["lr"] == 0.5
        assert other.param_groups[-1]["transfer_step"] == 1
