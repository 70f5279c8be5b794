"""The operators of ``torch.ops.aten``, which exported graphs call, and the functions that they are.

``torch.ops.aten.relu`` and its overload ``torch.ops.aten.relu.default`` mean ``torch.relu``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket


def name_of(function: Any) -> str:
    """The name of a torch function; of an operator, without the overload's."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


def functions_of(operator: Any) -> list[Any]:
    """The functions of torch that have an operator's name; none for anything else."""
    if not isinstance(operator, (OpOverload, OpOverloadPacket)):
        return []
    if not str(operator).startswith("aten."):
        return []
    name = name_of(operator)
    found = (getattr(place, name, None) for place in (torch, F, torch._C._nn))
    return [function for function in found if function is not None]


def argument_names_of(operator: Any) -> tuple[str, ...]:
    """The names of an operator's arguments after the first."""
    overload = getattr(operator, "default", operator)
    schema = getattr(overload, "_schema", None)
    return () if schema is None else tuple(one.name for one in schema.arguments[1:])
