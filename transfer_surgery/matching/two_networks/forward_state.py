"""What a forward pass leaves in a model beside its output: attributes, lists, buffers, randomness.

Several forward passes that take turns on one model must each find what they left themselves, and
afterwards the model is to be as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import starmap
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfer_surgery._randomness import random_streams
from transfer_surgery._tensors import overwrite

_MISSING = object()
_MOST = 200_000  # objects that are looked at
_LARGEST = 2**22  # elements of a tensor that is copied
_OPAQUE = (type, FunctionType, MethodType, ModuleType, str, bytes, int, float, complex)


class _Place(NamedTuple):
    """Something that can change, with how to read and to write it."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


class ForwardState:
    """The places that a forward pass of a model changes, found while one runs in `watch`.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> model.calls = []
        >>> state = ForwardState(model)
        >>> with state.watch():
        ...     model.calls.append("probe")
        >>> model.calls  # as it was
        []
        >>> with state.changed_to(state.start) as after:
        ...     model.calls.append("other")
        >>> after, model.calls
        ([['other']], [])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[_Place] = []
        self.start: list[Any] = []
        """What was at the places before any forward pass."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Find out what a forward pass changes; then put it back, also after an error."""
        before = [(found, _copy(found)) for found in _reachable(self._model)]
        streams = [(stream, stream.read()) for stream in starmap(_Place, random_streams())]
        try:
            yield
        finally:
            changed = [(stream, old) for stream, old in streams if _differ(stream.read(), old)]
            changed += [pair for found, old in before for pair in _changes(found, old)]
            self._places = [place for place, _ in changed]
            self.start = [old for _, old in changed]
            self._write(self.start)

    @contextmanager
    def changed_to(self, values: list[Any]) -> Iterator[list[Any]]:
        """Put values there for a while; yields a list that gets what is there at the end."""
        after: list[Any] = []
        self._write(values)
        try:
            yield after
        finally:
            after.extend(place.read() for place in self._places)
            self._write(self.start)

    def _write(self, values: list[Any]) -> None:
        for place, value in zip(self._places, values, strict=True):
            place.write(value)


def _reachable(model: nn.Module) -> Iterator[Any]:
    """Containers, tensors and generators that the model holds, each once."""
    waiting: deque[Any] = deque([model])
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Generator) or _is_small_state(value):
            yield value
        elif isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list | deque):
            yield value
            waiting.extend(value)
        elif isinstance(value, tuple | set | frozenset):
            waiting.extend(value)
        elif not isinstance(value, Tensor):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                waiting.append(attributes)


def _is_small_state(value: Any) -> bool:
    """Whether this is an ordinary tensor, no parameter, that is cheap to copy."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized)
        and value.numel() <= _LARGEST
    )


def _copy(found: Any) -> Any:
    if isinstance(found, torch.Generator):
        return found.get_state()
    return found.detach().clone() if isinstance(found, Tensor) else found.copy()


def _changes(found: Any, old: Any) -> Iterator[tuple[_Place, Any]]:
    """The places of a container, tensor or generator that changed, and what was there."""
    if isinstance(found, torch.Generator):
        if not torch.equal(found.get_state(), old):
            yield _Place(found.get_state, found.set_state), old
    elif isinstance(found, Tensor):
        if not torch.equal(found, old):
            yield _Place(found.detach().clone, partial(overwrite, found)), old
    elif isinstance(found, dict):
        for key in list(dict.fromkeys([*old, *found])):
            if found.get(key, _MISSING) is not old.get(key, _MISSING):
                read = partial(found.get, key, _MISSING)
                yield _Place(read, partial(_put, found, key)), old.get(key, _MISSING)
    elif len(found) != len(old) or any(a is not b for a, b in zip(found, old, strict=True)):
        yield _Place(found.copy, partial(_refill, found)), old


def _differ(new: Any, old: Any) -> bool:
    """Whether two states of a random stream differ: tensors or arrays in tuples and lists."""
    if isinstance(new, tuple | list):
        return any(_differ(a, b) for a, b in zip(new, old, strict=True))
    return bool((new != old).any()) if hasattr(new, "any") else bool(new != old)


def _put(container: dict[Any, Any], key: Any, value: Any) -> None:
    if value is _MISSING:
        container.pop(key, None)
    else:
        container[key] = value


def _refill(container: Any, parts: Any) -> None:
    container.clear()
    container.extend(parts)
