"""`wrap_optimizer(transfer=...)`: gates follow the schedule, stop, resume, and stay at its end."""

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam

from tests.helpers.explicit_loss import (
    assert_transferred,
    closure,
    gated_mlp,
    plain,
)
from transfer_surgery import TransferSchedule, structural_risk, wrap_optimizer
from transfer_surgery.units import gated_activations


@pytest.mark.parametrize("lr", [0.1, 0.01])
@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize("width", [4, 64])
def test_gates_follow_the_schedule(make: Any, lr: float, width: int) -> None:
    model = gated_mlp(width=width)
    schedule = TransferSchedule(60)
    optimizer = wrap_optimizer(make(model.parameters(), lr=lr), model, transfer=schedule)
    for step in range(1, 61):
        if step == 7:
            before = structural_risk(model, "mean").item()
            assert before > 0.999  # the start is at step 6
        plain(model, optimizer, False, step)
        budget = schedule.budget(step)
        if 1e-3 < budget < 1 - 1e-3:
            assert structural_risk(model, "mean").item() == pytest.approx(budget, abs=2e-4)
    assert_transferred(model)


def test_lbfgs_follows_the_schedule_too() -> None:
    model = gated_mlp()
    schedule = TransferSchedule(10, start=0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    wrap_optimizer(optimizer, model, transfer=schedule)
    for step in range(1, 7):
        closure(model, optimizer, False, 0)
        risk = structural_risk(model, "mean").item()
        assert risk == pytest.approx(schedule.budget(step), abs=1e-3)


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
