"""Torch calls as operations of an expression: a label and its operands."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations.calls import registered_name
from transfer_surgery.activations.expressions import CONSTANTS, is_elementwise
from transfer_surgery.activations.operators import name_of

_OPERATORS = {
    **dict.fromkeys(("mul", "multiply"), "*"),
    **dict.fromkeys(("add",), "+"),
    **dict.fromkeys(("sub", "subtract", "rsub"), "-"),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide", "rdiv", "rtruediv"), "/"),
    **dict.fromkeys(("pow", "rpow", "square"), "**"),
    **dict.fromkeys(("gt", "greater"), ">"),
    **dict.fromkeys(("ge", "greater_equal"), ">="),
    **dict.fromkeys(("lt", "less"), "<"),
    **dict.fromkeys(("le", "less_equal"), "<="),
    **dict.fromkeys(("neg", "negative"), "neg"),
    **dict.fromkeys(("max", "maximum", "fmax", "clamp_min"), "maximum"),
    **dict.fromkeys(("min", "minimum", "fmin", "clamp_max"), "minimum"),
}
_REVERSED = ("rsub", "rdiv", "rtruediv", "rpow")
CASTS: dict[str, torch.dtype | None] = {
    **{"float": torch.float32, "double": torch.float64},
    **{"half": torch.float16, "bfloat16": torch.bfloat16},
    **{"to": None, "type": None, "type_as": None},
}
"""Calls that make numbers of a mask."""


def operation(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, tuple[Any, ...]] | None:
    """Label and operands of a call that may be part of an expression, and is no activation."""
    name = base_name(function)
    label = _OPERATORS.get(name, name if name in CONSTANTS or is_elementwise(name) else "")
    if name in ("clamp", "clip"):
        low, high = (*args[1:], None, None)[:2]
        bounds = {"min": low, "max": high} | dict(kwargs)
        given = {key: bound for key, bound in bounds.items() if bound is not None}
        if len(given) == 1:
            (key, bound), kwargs = given.popitem(), {}
            name, args = f"clamp_{key}", (args[0], bound)
    if name in ("clamp_min", "clamp_max"):  # a number is no operand of maximum
        label = _OPERATORS[name] if isinstance(args[-1], Tensor) else name
    if kwargs and kwargs.keys() <= {"other", "value", "exponent"}:  # what comes last in each call
        args, kwargs = (*args, *kwargs.values()), {}
    if function is Tensor.where and len(args) == 3:
        args = (args[1], args[0], args[2])
    if name == "square":
        args = (*args, 2)
    if name in _REVERSED:
        args = args[::-1]
    tensors = sum(isinstance(one, Tensor) for one in args)
    numbers = sum(isinstance(one, (int, float)) and not isinstance(one, bool) for one in args)
    if not label or kwargs or not tensors or tensors + numbers != len(args):
        return None
    if label in ("maximum", "minimum") and tensors < 2:  # of all elements, or along an axis
        return None
    return label, args


def may_be_activation(function: Any) -> bool:
    """Whether a torch function may mean an activation, or be a part of one."""
    name = base_name(function)
    known = name in _OPERATORS or name in CONSTANTS or name in CASTS or is_elementwise(name)
    return registered_name(function) is not None or known


def base_name(function: Any) -> str:
    """``mul`` for ``torch.mul``, ``Tensor.mul_``, ``operator.mul`` and ``operator.imul``."""
    name = name_of(function)
    own = (getattr(Tensor, one, None) for one in (name, f"__{name}__"))
    if not name or (hasattr(function, "__code__") and function not in own):
        return ""  # somebody's own function of that name
    return name[1:] if _is_augmented(function, name) else name.strip("_")


def overwrites(function: Any) -> bool:
    """Whether a call changes its first argument."""
    name = name_of(function)
    if name in ("setitem", "__setitem__") or _is_augmented(function, name):
        return True
    return name.endswith("_") and not name.startswith("__")


def _is_augmented(function: Any, name: str) -> bool:
    """Whether it is ``operator.iadd`` or one of its like."""
    return getattr(operator, name, None) is function and (
        name[:1] == "i" and hasattr(operator, name[1:])
    )
