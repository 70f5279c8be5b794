"""What a model's code keeps outside of the model: caches, globals, attributes of classes.

The code of a stand-in is the user's own, and may put its tensors there: into ``lru_cache``, a dict
of the file, a closure. The model would find them later, and fake ones have no values. So what the
code can reach is noted before, and put back where something of a stand-in outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from transfer_surgery.sites.frames import names_in

_OBJECTS, _ELEMENTS = 20_000, 1_000
"""How many objects are looked at, and elements of each: code may hold whole data sets."""
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "transfer_surgery"}
_HOLDERS = {"builtins", "collections", "weakref", "types", "_thread"}
"""Modules of Python's whose objects hold what others put there."""
_OWN = vars(nn.Module()).keys()
_MISSING: Any = object()
_DEPTH = 6
_CACHE = type(functools.lru_cache(len))


class LeftBehindError(RuntimeError):
    """A tensor without values lives on where it cannot be removed."""


class Surroundings:
    """What the code of a model can reach outside of the model, as it was before it ran."""

    def __init__(self, model: nn.Module) -> None:
        self._steps: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {id(module): module for module in model.modules()}
        waiting = deque[Any](map(type, model.modules()))
        for module in model.modules():
            waiting += [value for name, value in vars(module).items() if name not in _OWN]
        while waiting and len(self._seen) < _OBJECTS:
            one = waiting.popleft()
            if self._is_new(one):
                with contextlib.suppress(Exception):  # whatever the user's objects raise
                    waiting += islice(self._note(one), _ELEMENTS)

    def clean(self, left: Iterable[weakref.ref[Any]], is_over: bool = True) -> None:
        """Put everything back as it was, where something of a stand-in has outlived it.

        What other threads wrote to the same objects meanwhile is lost then, so nothing is touched
        without need. After a failed run there is need: its error holds the stand-in.

        Args:
            left: what should be gone.
            is_over: False where the run has failed, and its error may hold tensors.

        Raises:
            LeftBehindError: a tensor without values is kept where it cannot be found.
        """
        steps = (partial(gc.collect, 1), self.put_back, gc.collect)
        for step in steps if is_over else steps[:2]:
            left = [one for one in left if one() is not None]
            if not left:
                return
            step()
        fake = next((x for one in left if isinstance(x := one(), FakeTensor)), None)
        if is_over and fake is not None:
            raise LeftBehindError(
                "The forward has put a tensor without values, on which it was examined, into "
                f"{_holder_of(fake)}, from where it cannot be removed. Empty that, and keep the "
                "tensor in an attribute, a dict or a list of the model instead."
            )

    def put_back(self) -> None:
        """Put everything back as it was."""
        for step in self._steps:
            with contextlib.suppress(Exception):  # such as that of a class that is sealed
                step()

    def _is_new(self, one: Any) -> bool:
        if id(one) in self._seen:
            return False
        self._seen[id(one)] = one  # which keeps it, and with it its identity
        return True

    def _note(self, one: Any) -> Iterator[Any]:
        """Note how an object is now, and go on to what can be reached from it."""
        kind = type(one)
        if issubclass(kind, type):
            if not _is_foreign(one.__module__):
                before = dict(vars(one))
                self._steps.append(partial(_put_back_attributes, one, before))
                yield from (*before.values(), *one.__mro__)
        elif kind is FunctionType:
            yield from self._note_function(one)
        elif kind is _CACHE:
            self._steps.append(partial(_empty, one, one.cache_info()))
            yield one.__wrapped__
        elif kind in (MethodType, classmethod, staticmethod):
            yield from (one.__func__, getattr(one, "__self__", None))
        elif kind is property:
            yield one.fget
        elif kind is partial:
            yield from (one.func, *one.args, *one.keywords.values())
        elif kind is CellType:
            self._steps.append(partial(_put_back_content, one, _content(one)))
            yield _content(one)
        elif issubclass(kind, dict):
            yield from self._note_dict(one)
        elif issubclass(kind, (list, deque, set)):
            self._steps.append(partial(_put_back_elements, one, list(one)))
            yield from one
        elif issubclass(kind, (tuple, frozenset)):
            yield from one
        is_holder = kind.__module__ in _HOLDERS or not _is_foreign(kind.__module__)
        attributes = getattr(one, "__dict__", None) if is_holder else None
        if isinstance(attributes, dict) and self._is_new(attributes):
            yield kind
            yield from self._note_dict(attributes)

    def _note_function(self, one: FunctionType) -> Iterator[Any]:
        """Go on to what a function reads: by its names, in modules too, its cells, its defaults."""
        if _is_foreign(one.__globals__.get("__name__", "")):
            return
        names, spaces = names_in(one.__code__), [one.__globals__]
        for space in spaces:
            if self._is_new(space):
                any(self._note_dict(space))
            for value in [space[name] for name in names & space.keys()]:
                if type(value) is not ModuleType:
                    yield value
                elif not _is_foreign(value.__name__) and all(vars(value) is not s for s in spaces):
                    spaces.append(vars(value))
        defaults = (one.__kwdefaults__ or {}).values()
        yield from (*(one.__closure__ or ()), *(one.__defaults__ or ()), *defaults)

    def _note_dict(self, one: dict[Any, Any]) -> Iterator[Any]:
        before = dict.copy(one)
        self._steps.append(partial(_put_back_items, one, before))
        return iter(before.values())


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] in _FOREIGN


def _content(cell: CellType) -> Any:
    with contextlib.suppress(ValueError):
        return cell.cell_contents
    return _MISSING


def _put_back_items(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    for key in held.keys() - before.keys():
        del held[key]
    for key, value in before.items():
        if held.get(key, _MISSING) is not value:
            held[key] = value


def _put_back_attributes(cls: type, before: dict[str, Any]) -> None:
    for name in vars(cls).keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name, _MISSING) is not value:
            setattr(cls, name, value)


def _put_back_elements(held: Any, before: list[Any]) -> None:
    if [*map(id, held)] != [*map(id, before)]:
        held.clear()
        (held.update if isinstance(held, set) else held.extend)(before)


def _put_back_content(cell: CellType, before: Any) -> None:
    if before is _MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = before


def _empty(cache: Any, before: Any) -> None:
    if cache.cache_info() != before:
        cache.cache_clear()


def _holder_of(value: Any) -> str:
    """Name what keeps an object, from the inside to the first holder that is no part of Python."""
    names, ours = list[str](), [value]
    for _ in range(_DEPTH):
        holders = [one for one in gc.get_referrers(ours[-1]) if type(one) is not FrameType]
        holders = [one for one in holders if one is not ours and all(one is not o for o in ours)]
        if not holders:
            break
        ours.append(holders[0])
        kind = type(holders[0])
        if issubclass(kind, Tensor):
            continue
        names.append(getattr(holders[0], "__qualname__", kind.__qualname__))
        if not _is_foreign(kind.__module__):
            break
    return " of ".join(names) or "something"
