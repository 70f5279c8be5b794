"""Code that walks over the modules or parameters of a network while the network runs."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import FrameType

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__


def runs_in(classes: Collection[str]) -> bool:
    """Whether the running code is that of the forward of one of these classes, and of no hook.

    Args:
        classes: full names, as `class_name` gives them.
    """
    if torch.compiler.is_compiling():  # frames cannot be looked at; forwards are what is compiled
        return True
    frame: FrameType | None = sys._getframe(1)
    codes = set()
    while frame is not None and frame.f_code is not _CALL:
        codes.add(frame.f_code)
        frame = frame.f_back
    if frame is None:
        return False
    module = frame.f_locals["self"]
    forward = getattr(module.forward, "__func__", module.forward)
    return getattr(forward, "__code__", None) in codes and class_name(module) in classes


def class_name(module: nn.Module) -> str:
    """The full name of a module's class; that of a converted caller is the same."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
