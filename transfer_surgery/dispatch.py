"""Gated units without rewriting: redirect an owner's activation calls while it runs.

Used where torch.fx cannot trace an owner, or where a call differs from what was traced. Slower than
generated code, and not for ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.overrides import TorchFunctionMode

from transfer_surgery.activations import recognise
from transfer_surgery.formulas import Tracker
from transfer_surgery.location import CallKey, KeyCounter, locate

__all__ = ["Entry", "dispatched_forward"]


class Entry(NamedTuple):
    """A call site of an owner, the name of its unit, and whether it calls a module."""

    key: CallKey
    unit: str
    is_module: bool


def dispatched_forward(
    base: type[nn.Module], owner: nn.Module, table: tuple[Entry, ...], args: Any, kwargs: Any
) -> Any:
    """Run ``base.forward`` on the owner with its listed activation calls going to their units."""
    with _Dispatch(owner, table):
        return base.forward(owner, *args, **kwargs)


class _Dispatch(TorchFunctionMode):
    def __init__(self, owner: nn.Module, table: tuple[Entry, ...]) -> None:
        super().__init__()
        self._owner, self._counter, self._tracker = owner, KeyCounter(), Tracker()
        self._units = {(entry.key, entry.is_module): entry.unit for entry in table}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        record, match = self._tracker.call(func, args, kwargs)
        call = match or recognise(func, args, kwargs)
        unit = None if call is None else self._unit_here()
        if call is None or unit is None:
            result = func(*args, **kwargs)
        else:
            result = self._owner.get_submodule(unit)(call.input, *call.operands)
        self._tracker.made(record, func, args, result)
        return result

    def _unit_here(self) -> str | None:
        """The unit of the running call, if the owner itself or an activation module makes it."""
        places = locate()
        depth = next((i for i, (_, module) in enumerate(places) if module is self._owner), None)
        if depth is None or depth > 1:
            return None
        inner = places[0][1]
        if depth == 1 and (inner is None or any(True for _ in inner.children())):
            return None
        location = places[depth][0]
        return self._units.get((self._counter.key(location), depth == 1))
