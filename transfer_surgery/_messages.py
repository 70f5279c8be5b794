"""What the caller of a public function is told: which argument is wrong, and the line of a warning.

An argument of a wrong type is an error that names it, before anything is done with it.
"""

from __future__ import annotations

import functools
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_NOT_THE_USERS = ("torch", "transfer_surgery", "zoo_adapters")
_LISTED = 5
_CLASSES: dict[Any, Any] = {float: Real, int: Integral, None: NoneType}


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise where an argument does not have the type that the function's signature says.

    Args:
        function: a function, of which this is the first line; or a dataclass.
        given: ``locals()`` in that line; of a dataclass the values of its fields.

    Raises:
        TypeError: the message names the argument, its value and its type.

    Examples:
        >>> def double(x: float) -> float:
        ...     check_arguments(double, locals())
        ...     return 2 * x
        >>> double(2), double("2")
        Traceback (most recent call last):
        TypeError: double(x='2'): x is a str, and has to be float.
    """
    hints = _hints(function)
    for name, value in given.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
            raise TypeError(
                f"{function.__name__}({name}={reprlib.repr(value)}): {name} is a "
                f"{type(value).__name__}, and has to be {wanted}."
            )


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError:  # names of a user's class that only type checkers see
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type, as far as a look at it can tell."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple | list):  # JSON makes lists of tuples
            return False
        items = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(items) == len(value) and all(map(_fits, value, items))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values())
    if origin is Sequence:
        sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return sequence and all(_fits(one, inner[0]) for one in value)
    if origin is type:
        return isinstance(value, type) and issubclass(value, inner[0])
    if origin is Iterable and hasattr(value, "__getitem__"):  # a data set, for example
        return True
    if isinstance(value, bool) and hint in (int, float):
        return False
    try:
        return hint is Any or isinstance(value, _CLASSES.get(hint, origin or hint))
    except TypeError:  # no class, but a TypeVar for example
        return True


def listed(names: Iterable[str]) -> str:
    """Names for a message: five of them, and whether there are more."""
    names = list(names)
    return ", ".join(names[:_LISTED]) + ", ..." * (len(names) > _LISTED)


def user_stacklevel() -> int:
    """The ``stacklevel`` of ``warnings.warn`` that points outside of torch and of this library.

    It is not a constant: schedulers, compilers and decorators add frames around a step. From Python
    3.12 on ``skip_file_prefixes`` does this.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    return level


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
