"""Compiled models and steps in training: nothing is compiled again while gates move."""

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, AdamW

from tests.helpers.compiled import compiled, converted
from tests.helpers.explicit_loss import (
    GAMMA,
    assert_transferred,
    batch,
    gated_cnn,
    mean_probability,
    mid_transfer,
    plain,
    task,
)
from transfer_surgery import TransferSchedule, wrap_optimizer


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What one test compiled does not count for the next; a recompilation is an error."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


HOW: dict[str, dict[str, Any]] = {
    "schedule": {"transfer": TransferSchedule(20, start=0.1, end=0.7)},
    "share in order": {"transfer": TransferSchedule(20, fraction=0.5, order="front_to_back")},
    "gamma": {"gamma": GAMMA},
}


def train(model: nn.Module, run: Any, how: dict[str, Any]) -> None:
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.05, momentum=0.9), model, **how)
    for step in range(20):
        task(run, step).backward()
        optimizer.step()
        optimizer.zero_grad()


INDUCTOR = pytest.param(
    *("functional", "schedule", "inductor"),
    marks=pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler"),
)


# What is compiled anew does not depend on the backend, and "eager" takes no time of its own.
@pytest.mark.parametrize(
    ("name", "how", "backend"),
    [
        ("modules", "schedule", "eager"),
        ("functional", "share in order", "eager"),
        ("functional", "gamma", "eager"),
        INDUCTOR,
    ],
)
def test_nothing_is_compiled_again_while_gates_move(name: str, how: str, backend: str) -> None:
    model = converted(name).train()
    train(model, compiled(model, backend), HOW[how])  # a recompilation would raise
    assert counters["stats"]["unique_graphs"] == 1
    if how == "schedule":
        assert mean_probability(model) < 1e-4
        assert_transferred(model)


def test_changing_between_training_and_evaluation_compiles_each_once() -> None:
    model = mid_transfer(converted("functional"))
    run = compiled(model, "eager")
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, **HOW["schedule"])
    with torch._dynamo.config.patch(error_on_recompile=False):
        for seed in range(4):
            model.train()
            plain(run, optimizer, False, seed)
            with torch.no_grad():
                run.eval()(batch(seed)[0])
    assert counters["stats"]["unique_graphs"] == 2


# ---- the hooks


def wrap_inner(model: nn.Module, optimizer: Any) -> Any:
    wrap_optimizer(optimizer, model, gamma=GAMMA)
    return compiled(model, "eager")


def wrap_compiled(model: nn.Module, optimizer: Any) -> Any:
    run = compiled(model, "eager")
    wrap_optimizer(optimizer, run, gamma=GAMMA)
    return run


def compile_in_place(model: nn.Module, optimizer: Any) -> Any:
    model.compile(fullgraph=True, backend="eager")
    wrap_optimizer(optimizer, model, gamma=GAMMA)
    return model


@pytest.mark.parametrize("way", [wrap_inner, wrap_compiled, compile_in_place])
def test_steps_of_a_compiled_model_equal_those_of_the_explicit_loss(
    way: Callable[[nn.Module, Any], Any],
) -> None:
    model = mid_transfer(gated_cnn())
    reference = copy.deepcopy(model)
    optimizer, explicit = (SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, reference))
    run = way(model, optimizer)
    for seed in range(3):
        plain(run, optimizer, False, seed)
        plain(reference, explicit, True, seed)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-3, atol=1e-4)


STEPS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9),
    "adam": lambda m: Adam(m.parameters(), lr=0.01, eps=1e-4),
    "adam-capturable": lambda m: Adam(
        m.parameters(), lr=torch.tensor(0.01), eps=1e-4, capturable=True
    ),
    "adamw-fused": lambda m: AdamW(m.parameters(), lr=0.01, eps=1e-4, fused=True),
}


def steps(make: Any, compile_step: bool) -> tuple[nn.Module, list[int]]:
    """Train with a step that is compiled or not; the model and the number of graphs by step."""
    model, graphs = gated_cnn(), []
    optimizer = wrap_optimizer(make(model), model, transfer=SHORT)
    step = torch.compile(optimizer.step, backend="eager") if compile_step else optimizer.step
    for seed in range(6):
        task(model, seed).backward()
        step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return model, graphs


SHORT = TransferSchedule(10, start=0, end=0.9)


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_runs_the_hooks_and_is_not_compiled_again_for_them(name: str) -> None:
    """Hooks that were traced would be compiled again for each progress of the schedule."""
    with torch._dynamo.config.patch(error_on_recompile=False):  # the second step has a state
        model, graphs = steps(STEPS[name], True)
    assert graphs[1:] == [graphs[1]] * 5
    assert mean_probability(model) == pytest.approx(SHORT.budget(6), abs=1e-3)
    if name != "adam-capturable":  # which runs on a CPU only where it is compiled
        expected, _ = steps(STEPS[name], False)
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_step_compiled_as_one_graph_is_refused_with_the_reason() -> None:
    model = gated_cnn()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=GAMMA)
    task(model, 0).backward()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile step\(\) without fullgraph"):
        step()
