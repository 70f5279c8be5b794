"""The Python frames of a running call: whose code each of them is."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

# With the separator: torchvision is none of torch's.
_TORCH, _HERE = (f"{Path(module).parent}{os.sep}" for module in (torch.__file__, __file__))
MODULE_CALL = nn.Module._call_impl.__code__
CHECKPOINT = torch.utils.checkpoint.__file__


def call_frames(caller: nn.Module) -> list[FrameType]:
    """The frames from the call of ``caller`` to the running one, the outermost first.

    The innermost frames in which torch only passes the call on are left out.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is MODULE_CALL:
            if frame.f_locals["self"] is caller:
                break
            frames = []  # the inside of a module that the caller calls is not the caller's code
        elif code.co_filename == MODULE_CALL.co_filename or code.co_filename.startswith(_HERE):
            pass
        elif frames or not is_torch(code) or isinstance(frame.f_locals.get("self"), nn.Module):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def leads_to(value: Any, code: CodeType) -> bool:
    """Whether a call of a value runs this code, at once or inside of torch's own decorators."""
    wrapper = code_of(value)
    if wrapper is None or wrapper is code or not is_torch(wrapper):
        return wrapper is code
    return leads_to(getattr(value, "__wrapped__", None), code)


def code_of(value: Any) -> CodeType | None:
    """The code that runs when something is called: a function, a method, an object, a partial."""
    value = without_partials(value)
    if isinstance(value, MethodType):
        return code_of(value.__func__)
    if isinstance(value, FunctionType):
        return value.__code__
    call = inspect.getattr_static(type(value), "__call__", None)
    return call.__code__ if isinstance(call, FunctionType) else None


def without_partials(value: Any) -> Any:
    """What is called in the end by a ``functools.partial``, or by several; anything else itself."""
    while isinstance(value, functools.partial):
        value = value.func
    return value


def names_in(code: CodeType) -> set[str]:
    """The names and words that code, and what is written inside of it, uses."""
    several = (one if isinstance(one, (tuple, frozenset)) else (one,) for one in code.co_consts)
    words = {word for words in several for word in words if isinstance(word, str)}
    inner = (names_in(one) for one in code.co_consts if isinstance(one, CodeType))
    return words.union(code.co_names, *inner)


def names_read(module: nn.Module) -> set[str]:
    """The names in the code by which a module computes; training flags are not among them."""
    own = itertools.takewhile(lambda cls: cls is not nn.Module, type(module).__mro__)
    methods = {name: value for cls in own for name, value in vars(cls).items()}
    codes = [code_of(m) for n, m in methods.items() if n not in ("__init__", "extra_repr")]
    found = set[str]().union(*(names_in(code) for code in codes if code is not None))
    return found - {"training", "inplace"}


def is_users(file: str) -> bool:
    """Whether a source file is neither torch's nor of this package."""
    return not file.startswith((_TORCH, _HERE))


def is_torch(code: CodeType) -> bool:
    """Whether code is torch's own."""
    return code.co_filename.startswith(_TORCH)


def find_own_function(frames: list[FrameType]) -> int | None:
    """Which frame is the first to run the forward of an ``autograd.Function`` of the user's."""
    found = (i for i, f in enumerate(frames) if not is_torch(f.f_code) and _is_function(f))
    return next(found, None)


def _is_function(frame: FrameType) -> bool:
    held = frame.f_globals.get(frame.f_code.co_qualname.partition(".")[0])
    if isinstance(held, type) and issubclass(held, torch.autograd.Function):
        return True
    return isinstance(first_local(frame), torch.autograd.function.FunctionCtx)


def first_local(frame: FrameType) -> Any:
    """The first argument of the function that a frame runs; None where it has none."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
