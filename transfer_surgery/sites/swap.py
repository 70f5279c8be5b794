"""What runs in an edited function in the place of what the user's code calls there."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.sites.copies import UneditableError, copy_in_wrappers, find_functions
from transfer_surgery.sites.source import SEEN, Function
from transfer_surgery.sites.unseen import shows_activation

PREFIX = "_ts_"
"""Start of the names that edited code has beside the user's own."""


def make_swap(
    meant: Function,
    base: type,
    edit: Callable[[FunctionType], FunctionType],
    *,
    may_vary: bool,
) -> Callable[[Any], Any]:
    """From what the code calls to the same with its units, looked up each time as the user's is.

    Args:
        meant: the function that is called.
        base: class of the caller.
        edit: makes an edited copy of that function, or of another one with the same source.
        may_vary: whether the code may call other functions in the same place: no need for a warning
            then, unless their source shows an activation.

    Raises:
        UneditableError: the function is there, but it cannot be copied.
    """
    known = SEEN.get(meant) or next(iter(find_functions(meant, base)), None)
    copy = None if known is None else copy_in_wrappers(known, meant, edit)
    if known is not None and copy is None:
        raise UneditableError(f"{meant.qualname} is hidden by what is around it")
    # Without closure and defaults all functions with the same code are the same.
    code = None
    if known and not (known.__closure__ or known.__defaults__ or known.__kwdefaults__):
        code = known.__code__

    def copy_of(function: FunctionType) -> Callable[..., Any]:
        with contextlib.suppress(UneditableError):
            if (edited := copy_in_wrappers(function, meant, edit)) is not None:
                return edited
        if not may_vary or shows_activation(function):
            warnings.warn(
                f"{function.__qualname__} is called where another function was when the model was "
                "converted: its activations have no gates. Revert, and convert again.",
                RuntimeWarning,
                stacklevel=3,
            )
        return functools.partial(_without_units, function)

    # torch.compile takes a copy that is an attribute, and makes it while it reads the code.
    kept, names = SimpleNamespace(), dict[FunctionType, str]()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def keep(function: FunctionType) -> str:
        if function not in names:
            setattr(kept, f"copy_{len(names)}", copy_of(function))
            names[function] = f"copy_{len(names)}"
        return names[function]

    def swap(value: Any) -> Any:
        if isinstance(value, functools.partial):
            return functools.partial(swap(value.func), *value.args, **value.keywords)
        function: Any = value
        first: Any = ()
        if isinstance(value, MethodType):
            function, first = value.__func__, (value.__self__,)
        elif not isinstance(value, FunctionType):
            function, first = type(value).__call__, (value,)
        if not isinstance(function, FunctionType):
            return functools.partial(_without_units, value)  # it has no Python code
        if function is known or (code is not None and function.__code__ is code):
            edited: Any = copy
        elif torch.compiler.is_compiling():
            edited = getattr(kept, keep(function))
        else:
            edited = copy_of(function)
        return functools.partial(edited, *first) if first else edited

    return swap


def _without_units(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **{k: v for k, v in kwargs.items() if not k.startswith(PREFIX)})


def missed(value: Any, text: str) -> Any:
    """Pass a value on, with a warning: it comes from an activation without gates."""
    if isinstance(value, Tensor) and not torch.compiler.is_compiling():
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return value
