"""What runs in an edited function in the place of what the user's code calls there."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinMethodType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.activations import (
    Activation,
    argument_names,
    get_activation,
    recognise,
    registered_name,
)
from transfer_surgery.sites.copies import UneditableError, copy_in_wrappers, find_functions
from transfer_surgery.sites.frames import is_torch
from transfer_surgery.sites.source import SEEN, Function
from transfer_surgery.sites.unseen import shows_activation

PREFIX = "_ts_"
"""Start of the names that edited code has beside the user's own."""
Swap = Callable[[FunctionType], FunctionType | None]
"""From a function to its edited copy; None of another function."""
_NO_MORE = object()


def make_swap(meant: Function, base: type, edit: Callable[[FunctionType], FunctionType]) -> Swap:
    """The swap of one function.

    Args:
        meant: the function that is called.
        base: class of the caller.
        edit: makes an edited copy of that function, or of another one with the same source.

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

    def swap(function: FunctionType) -> FunctionType | None:
        if function is known or (code is not None and function.__code__ is code):
            return copy
        with contextlib.suppress(UneditableError):
            return copy_in_wrappers(function, meant, edit)
        return None

    return swap


def make_choice(
    swaps: Sequence[Swap],
    ends: Sequence[tuple[Activation | None, bool]],
    text: str,
    *,
    may_vary: bool,
) -> Callable[..., Any]:
    """From what the code calls to the same with its units, looked up each time as the user's is.

    Args:
        swaps: of the functions that may be called.
        ends: the activations that may be called, None for a module; and whether what is given for
            each is an iterator over units, which take turns.
        text: the warning of an activation that has no unit, with its ``name`` and ``how`` open.
        may_vary: whether the code may call other functions in the same place: no need for a warning
            then, unless their source shows an activation.

    Returns:
        A function of what is called, and of what each swap and each end is given: arguments for
        the copy; a unit, and the module whose place it takes.
    """
    defaults = [get_activation("identity" if what is None else what.name) for what, _ in ends]
    # torch.compile takes a copy that is an attribute, and makes it while it reads the code.
    kept, names = SimpleNamespace(), dict[FunctionType, tuple[int, str]]()

    def copy_of(function: FunctionType) -> tuple[int, Callable[..., Any] | None]:
        for number, swap in enumerate(swaps):
            if (copy := swap(function)) is not None:
                return number, copy
        if not is_torch(function.__code__) and (not may_vary or shows_activation(function)):
            warnings.warn(
                f"{function.__qualname__} is called where another function was when the model was "
                "converted: its activations have no gates. Revert, and convert again.",
                RuntimeWarning,
                stacklevel=3,
            )
        return 0, None

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def keep(function: FunctionType) -> tuple[int, str]:
        if function not in names:
            number, copy = copy_of(function)
            names[function] = number, f"copy_{len(names)}"
            setattr(kept, names[function][1], copy)
        return names[function]

    def choose(value: Any, /, *given: Any) -> Any:
        if isinstance(value, BuiltinMethodType) and not torch.compiler.is_compiling():
            method = getattr(Tensor, value.__name__, None)
            if isinstance(value.__self__, Tensor) and method is not None:
                value = functools.partial(method, value.__self__)
        if isinstance(value, functools.partial):
            return functools.partial(choose(value.func, *given), *value.args, **value.keywords)
        function: Any = value
        first: Any = ()
        if isinstance(value, MethodType):
            function, first = value.__func__, (value.__self__,)
        elif not isinstance(value, FunctionType):
            function, first = getattr(type(value), "__call__", None), (value,)  # noqa: B004
        if isinstance(function, FunctionType) and function is not nn.Module.__call__:
            number, copy = 0, None
            if not torch.compiler.is_compiling():
                number, copy = copy_of(function)
            elif swaps:
                number, name = keep(function)
                copy = getattr(kept, name)
            if copy is not None:
                return functools.partial(copy, *first, **given[number])
        return functools.partial(call, value, given[len(swaps) :])

    def call(value: Any, units: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Not by __closure__: torch.compile can call no function whose cells were looked at.
        is_users = isinstance(value, nn.Module) or (
            isinstance(value, FunctionType) and value.__code__.co_freevars
        )
        name, known = (None, ()) if is_users else _read(value)
        how = "" if name in (None, "clamp") else "in a branch that did not run"
        for (what, several), default, unit in zip(ends, defaults, units, strict=True):
            inputs, named = args, kwargs
            if what is None:
                unit, module = unit
                if value is not module:
                    continue
            elif what.name == name:
                given = dict(zip(known, args, strict=False)) | kwargs
                given.pop("inplace", None)
                inputs = tuple(given.pop(one, None) for one in ("input", *default.operands))
                named = {}
                if not _are_equal(dict(default.parameters) | given, what.parameters):
                    # Other settings may mean no activation, as a clamp at one bound does.
                    if not torch.compiler.is_compiling() and recognise(value, args, kwargs):
                        how = "with other settings than"
                    continue
            else:
                continue
            if several:
                unit = next(unit, _NO_MORE)
            if unit is not None and unit is not _NO_MORE:
                return unit(*inputs, **named)
            how = "" if unit is None else "more often than"
            break
        result = value(*args, **kwargs)
        if not how:
            return result
        return missed(result, text.format(name=name or type(value).__name__, how=how), 3)

    return choose


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _read(function: Any) -> tuple[str | None, tuple[str, ...]]:
    """The activation that a torch function may mean, and the names of its arguments."""
    return registered_name(function), ("input", *argument_names(function))


def _are_equal(given: Mapping[str, Any], wanted: Sequence[tuple[str, Any]]) -> bool:
    """Whether settings are those of an activation, which are no tensors."""
    return len(given) == len(wanted) and all(
        not isinstance(given.get(name), Tensor) and name in given and given[name] == value
        for name, value in wanted
    )


def missed(value: Any, text: str, stacklevel: int = 2) -> Any:
    """Pass a value on, with a warning: it comes from an activation without gates."""
    if isinstance(value, Tensor) and not torch.compiler.is_compiling():
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)
    return value
