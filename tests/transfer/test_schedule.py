"""Transfer schedules: budgets, and gates that follow them by one common offset."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfer_surgery import HardConcrete, TransferSchedule
from transfer_surgery.transfer import project
from transfer_surgery.units import Gate, make_gate
from transfer_surgery.units.gate_kinds import HardConcreteGate

SHIFT = -2 / 3 * math.log(0.1 / 1.1)  # P(z != 0) = sigmoid(log_alpha + SHIFT), Eq. 14


def gate_at(log_alpha: Tensor, kind: str = "hard_concrete") -> Gate:
    gate = make_gate(kind, tuple(log_alpha.shape))
    gate.log_alpha.data.copy_(log_alpha)
    return gate


def mean_probability(log_alpha: Tensor, offset: float = 0.0) -> float:
    return torch.sigmoid(log_alpha.detach().double() + offset + SHIFT).mean().item()


def bisected_offset(log_alpha: Tensor, budget: float) -> float:
    """The reference: plain bisection in float64."""
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if mean_probability(log_alpha, middle) < budget:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# ---- budgets


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_budget_starts_at_1_ends_at_what_is_kept_and_never_rises(shape: str) -> None:
    schedule = TransferSchedule(200, fraction=0.6, start=0.1, end=0.7, shape=shape)
    budgets = [schedule.budget(step) for step in range(250)]
    assert budgets[:21] == [1.0] * 21
    assert budgets[140:] == [pytest.approx(0.4)] * 110
    assert all(a >= b for a, b in itertools.pairwise(budgets))
    assert schedule.budget(80) == pytest.approx(0.7)  # half way: half of the fraction


def test_budget_has_the_shape_that_was_asked_for() -> None:
    linear = TransferSchedule(100, start=0, end=1.0, shape="linear")
    cosine = TransferSchedule(100, start=0, end=1.0)
    for step in range(101):
        assert linear.budget(step) == pytest.approx(1 - step / 100)
        assert cosine.budget(step) == pytest.approx((1 + math.cos(math.pi * step / 100)) / 2)


def test_integers_of_numpy_are_steps_as_those_of_python_are() -> None:
    schedule = TransferSchedule(np.int64(100), start=np.int64(10), end=np.int32(50))
    assert (schedule.budget(10), schedule.budget(30)) == (1.0, pytest.approx(0.5))
    assert schedule.budget(50) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps=0: at least 1"),
        ({"fraction": 0.0}, r"fraction=0.0: the share .* lies in \(0, 1\]"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"start": -0.1}, "start=-0.1, end=0.7: shares of total_steps"),
        ({"start": 0.7}, "start=0.7, end=0.7"),
        ({"end": 101}, "end=101: .* 0 <= start < end <= total_steps"),
        ({"end": 1}, "end=1 would be the first step; write end=1.0"),
        ({"order": "random"}, "order='random': use one of joint, front_to_back"),
        ({"end": math.nan}, "end=nan"),
        ({"shape": "step"}, "shape='step': use one of cosine, linear"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferSchedule(**{"total_steps": 100} | arguments)


# ---- the projection


@st.composite
def locations(draw: st.DrawFn) -> Tensor:
    """Any log_alpha: one gate or many, near or far from each other, in one or two clusters."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    number = draw(st.sampled_from([1, 2, 3, 17, 1000]))
    spread = draw(st.floats(0, 30))
    gap = draw(st.floats(0, 60))
    second = torch.rand(number, generator=generator) < draw(st.floats(0, 1))
    centre = draw(st.floats(-30, 30))
    return torch.randn(number, generator=generator) * spread + second * gap + centre


# A budget between two clusters, where next to no gate is open: Newton's method jumped off there.
@example(torch.tensor([0.0, 0.0, 35.0]), 0.33333298563957214)
@given(locations(), st.floats(1e-3, 1 - 1e-3))
@settings(max_examples=300)
def test_projection_meets_the_budget_by_the_offset_that_bisection_finds(
    log_alpha: Tensor, budget: float
) -> None:
    gate = gate_at(log_alpha)
    project([gate], 1 - budget)
    assert mean_probability(gate.log_alpha) == pytest.approx(budget, abs=1e-4)

    offsets = gate.log_alpha.detach().double() - log_alpha.double()
    assert (offsets - offsets[0]).abs().max() < 1e-4  # one offset, for all gates
    expected = bisected_offset(log_alpha, budget)
    found = mean_probability(log_alpha, offsets[0].item())
    assert found == pytest.approx(mean_probability(log_alpha, expected), abs=1e-4)


@given(locations(), st.floats(1e-3, 1 - 1e-3), st.integers(1, 20))
@settings(max_examples=150)
def test_with_a_fraction_the_lowest_gates_move_and_the_others_stay(
    log_alpha: Tensor, budget: float, twentieths: int
) -> None:
    gate = gate_at(log_alpha)
    project([gate], 1 - budget, fraction=twentieths / 20)
    after = gate.log_alpha.detach()
    going = math.ceil(Fraction(twentieths, 20) * log_alpha.numel())
    order = log_alpha.argsort()
    kept = log_alpha[order[going:]]
    # A tie, up to rounding, leaves open which of the two goes.
    assume(not (kept - log_alpha[order[going - 1]] < 1e-4).any())
    at_source = torch.where(kept + SHIFT < 9.6, 9.61 - SHIFT, kept)  # moved back if it had left it
    torch.testing.assert_close(after[order[going:]], at_source)
    assert mean_probability(after) == pytest.approx(
        1 - going / log_alpha.numel() * (1 - budget), abs=1e-3
    )
    assert mean_probability(after[order[:going]]) == pytest.approx(budget, abs=1e-4)


@given(locations(), st.integers(1, 20))
@settings(max_examples=100)
def test_at_the_end_every_eval_gate_is_exactly_0_or_1(log_alpha: Tensor, twentieths: int) -> None:
    gate = gate_at(log_alpha)
    project([gate], 1.0, fraction=twentieths / 20)
    z = gate.predict()
    going = math.ceil(Fraction(twentieths, 20) * log_alpha.numel())
    assert int((z == 0).sum()) == going
    assert int((z == 1).sum()) == log_alpha.numel() - going
    assert (gate.log_alpha.detach().abs() >= 8).all()

    before = gate.log_alpha.detach().clone()
    project([gate], 1.0, fraction=twentieths / 20)
    assert torch.equal(gate.log_alpha, before)  # nothing is left to do


def test_a_fraction_of_n_that_is_whole_up_to_rounding_is_not_exceeded() -> None:
    gate = HardConcreteGate((30,))
    project([gate], 1.0, fraction=0.1)  # 0.1 * 30 = 3.0000000000000004
    assert int((gate.predict() == 0).sum()) == 3


def test_nothing_moves_before_the_start() -> None:
    gate = HardConcreteGate((50,))
    before = gate.log_alpha.detach().clone()
    project([gate], 0.0)
    assert torch.equal(gate.log_alpha, before)


def test_gates_of_any_kind_and_shape_share_one_offset() -> None:
    gates = [
        HardConcreteGate(()),
        HardConcreteGate((5, 2, 3), HardConcrete(temperature=0.4, stretch=(-0.3, 1.2))),
        make_gate("bernoulli", (7,)),
    ]
    before = [gate.log_alpha.detach().clone() for gate in gates]
    project(gates, 0.35)
    probabilities = torch.cat([gate.probability().flatten() for gate in gates])
    assert probabilities.mean().item() == pytest.approx(0.65, abs=1e-4)
    offsets = torch.cat([(g.log_alpha - b).flatten() for g, b in zip(gates, before, strict=True)])
    torch.testing.assert_close(offsets, offsets[:1].expand_as(offsets))


@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_a_step_that_a_grad_scaler_skips_moves_nothing(progress: float) -> None:
    gate = HardConcreteGate((50,))
    before = gate.log_alpha.detach().clone()
    project([gate], progress, skip=torch.tensor(1.0))
    assert torch.equal(gate.log_alpha, before)
    project([gate], progress, skip=torch.tensor(0.0))
    assert not torch.equal(gate.log_alpha, before)


def test_a_million_gates_meet_the_budget() -> None:
    gate = HardConcreteGate((10**6,))
    for progress in (0.001, 0.5, 0.999):
        project([gate], progress)
        assert mean_probability(gate.log_alpha) == pytest.approx(1 - progress, abs=1e-4)
