"""Whatever is given to a public function, a wrong type is an error that names the argument."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import transfer_surgery
from transfer_surgery import HardConcrete, ModelSpec, PerChannel, TransferSchedule
from transfer_surgery._messages import check_arguments
from transfer_surgery.units import GateSettings, as_patterns

# `structural_risk` is called at each step, and `get_activation` says which names it knows.
PUBLIC = [getattr(transfer_surgery, name) for name in transfer_surgery.__all__]
FUNCTIONS = [f for f in PUBLIC if inspect.isfunction(f) or dataclasses.is_dataclass(f)]
CHECKED = [f for f in FUNCTIONS if f.__name__ not in ("structural_risk", "get_activation")]
RIGHT = {
    "model": nn.ReLU(),
    "teacher": nn.ReLU(),
    "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1),
    "batches": (),
    "example_input": None,
    "target": "relu",
    "file": "file",
    "path": "file",
    "made_by": ModelSpec("name"),
    "name": "name",
    "text": "x",
    "settings": HardConcrete,
    "steps": 1,
    "total_steps": 1,
    "axis": 1,
}


@pytest.mark.parametrize("function", CHECKED, ids=lambda function: function.__name__)
def test_a_wrong_type_is_refused_by_name(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name: RIGHT[p.name] for p in parameters if p.default is p.empty}
    for parameter in parameters:
        if parameter.annotation not in ("Any", "AnyOptimizer"):
            with pytest.raises((TypeError, ValueError), match=parameter.name):
                function(**needed | {parameter.name: object()})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: HardConcrete(temperature="0.5"), r"^HardConcrete\(temperature='0.5'\): .* float"),  # type: ignore[arg-type]
        (lambda: HardConcrete(temperature=True), "is a bool, and has to be float"),
        (lambda: HardConcrete(stretch=(0.1, "x")), r"stretch=\(0.1, 'x'\)"),  # type: ignore[arg-type]
        (lambda: HardConcrete(stretch=(0.1,)), r"stretch=\(0.1,\)"),  # type: ignore[arg-type]
        (lambda: TransferSchedule(10.0), r"total_steps=10.0\): .* int"),  # type: ignore[arg-type]
        (lambda: TransferSchedule(10, order=[1]), r"order=\[1\]\): order is a list"),  # type: ignore[list-item]
        (lambda: PerChannel(1.5), "axis is a float"),  # type: ignore[arg-type]
        (lambda: transfer_surgery.register_gate("x", dict), "settings is a type"),  # type: ignore[arg-type]
        (lambda: as_patterns(3), "3 is no pattern: give a glob"),
        (lambda: as_patterns(["stem", 3]), "3 is no pattern: give a glob"),
    ],
)
def test_what_is_wrong_with_it_is_said(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        wrong()


def test_what_has_the_type_in_the_end_is_taken() -> None:
    import numpy as np

    assert HardConcrete(temperature=np.float32(0.5), stretch=[-0.2, 2]).stretch == (-0.2, 2)  # type: ignore[arg-type]
    assert TransferSchedule(np.int64(3)).total_steps == 3  # type: ignore[arg-type]
    assert PerChannel(np.int64(1)).axis == 1  # type: ignore[arg-type]


def test_types_that_no_look_can_tell_are_taken() -> None:
    def function(x: Unknown, y: Any) -> None:  # type: ignore[name-defined]  # noqa: F821
        check_arguments(function, locals())

    function(1, 2)


def test_settings_of_a_gate_of_one_s_own_are_checked() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(GateSettings):
        rate: float = 0.5

    assert Mine(1).rate == 1
    with pytest.raises(TypeError, match=r"Mine\(rate='x'\): rate is a str, and has to be float"):
        Mine("x")  # type: ignore[arg-type]
