"""Every optimizer that timm lists, wrapped: equal to the explicit loss, and on schedule."""

from collections.abc import Iterator
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim import Optimizer

from tests.helpers.explicit_loss import (
    Make,
    assert_loop_equals_the_explicit_one,
    assert_loop_reaches_the_budget,
    gates,
    plain,
    risk,
    task,
)

# Of other packages, which are for CUDA: bitsandbytes and apex.
_ELSEWHERE = ("bnb", "fused")
# They draw numbers for one parameter after the other, so that the order of the groups counts.
_RANDOM = ["adahessian", "kron", "kronc", "kronw"]
NAMES = [
    name
    for name in timm.optim.list_optimizers()
    if not name.startswith(_ELSEWHERE) and name not in _RANDOM
]
# One of a family in `make test`: momentum, adaptive, sign, factored, trust ratio, orthogonalised,
# preconditioned, second order, and averages of the weights.
FAMILIES = {
    "nesterov",
    "nadamw",
    "lion",
    "adafactorbv",
    "lamb",
    "muon",
    "kron",
    "adahessian",
    "lookahead_adamw",
}
LOOKAHEADS = ["lookahead_lion", "lookahead_adamw", "lookahead_nesterov", "lookahead_lamb"]


def families_first(names: list[str]) -> list[Any]:
    """All of these, those that are not listed above as slow ones."""
    return [
        pytest.param(name, marks=() if name in FAMILIES else pytest.mark.slow) for name in names
    ]


pytestmark = pytest.mark.filterwarnings("ignore:.*opt_einsum:UserWarning")  # kron's advice


@pytest.fixture(autouse=True)
def _no_compiler() -> Iterator[None]:
    """Kron compiles its formulas, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def made_by_timm(name: str) -> Make:
    """In timm's way: weight decay for matrices only, in groups of their own."""
    return lambda model: timm.optim.create_optimizer_v2(
        model, opt=name, lr=0.01, weight_decay=0.02, momentum=0.9
    )


def gates_last(name: str) -> Make:
    """Parameters in the order that `wrap_optimizer` gives them."""

    def make(model: nn.Module) -> Optimizer:
        ours = set(gates(model))
        rest = [p for p in model.parameters() if p not in ours]
        groups = [{"params": rest}, {"params": gates(model)}]
        return timm.optim.create_optimizer_v2(groups, opt=name, lr=0.01, weight_decay=0.02)

    return make


def second_order(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    loss = task(model, seed)
    (loss + risk(model) if explicit else loss).backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", families_first(NAMES + LOOKAHEADS))
def test_steps_equal_those_of_the_explicit_loss(name: str) -> None:
    # timm gives vectors no weight decay, so that the reference has none at the gates.
    assert_loop_equals_the_explicit_one(made_by_timm(name), plain, gate_weight_decay=0.0)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("name", families_first(_RANDOM))
def test_steps_of_optimizers_that_draw_numbers_equal_those_of_the_explicit_loss(name: str) -> None:
    loop = second_order if name == "adahessian" else plain
    assert_loop_equals_the_explicit_one(gates_last(name), loop)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("name", families_first(NAMES + _RANDOM))
def test_gates_keep_to_the_schedule(name: str) -> None:
    loop = second_order if name == "adahessian" else plain
    assert_loop_reaches_the_budget(made_by_timm(name), loop)
