"""The operators of ``torch.ops.aten``, which exported graphs call, and the functions that they are.

``torch.ops.aten.relu`` and its overload ``torch.ops.aten.relu.default`` mean ``torch.relu``.
"""

from __future__ import annotations

import functools
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket


def name_of(function: Any) -> str:
    """The name of a torch function; of an operator, without the overload's; empty without one."""
    try:
        name = getattr(function, "__name__", "")
    except Exception:  # whatever the user's objects raise
        return ""
    return str(name).partition(".")[0]


@functools.cache
def tags_of(name: str) -> frozenset[torch.Tag]:
    """What torch says of its operators of that name, such as that they are reductions."""
    packet: Any = getattr(torch.ops.aten, name, None)
    overloads: list[str] = getattr(packet, "overloads", list)()
    return frozenset(tag for one in overloads for tag in getattr(packet, one).tags)


def functions_of(operator: Any) -> list[Any]:
    """The functions of torch that have the name of an operator, or of one in ``torch._C``."""
    if isinstance(operator, (OpOverload, OpOverloadPacket)):
        if not str(operator).startswith("aten."):
            return []
    elif not isinstance(operator, BuiltinFunctionType):
        return []
    name = name_of(operator).rstrip("_")
    found = (getattr(place, name, None) for place in (torch, F, torch._C._nn))
    return [function for function in found if function is not None]


def argument_names_of(operator: Any) -> tuple[str, ...]:
    """The names of an operator's arguments after the first."""
    overload = getattr(operator, "default", operator)
    schema = getattr(overload, "_schema", None)
    return () if schema is None else tuple(one.name for one in schema.arguments[1:])
