"""Gated units without editing: redirect a caller's activation calls while its own code runs.

Used where the source is missing or does not show the call. Slower than edited code, and not for
``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from transfer_surgery.activations import Activation, Tracker
from transfer_surgery.sites.call_location import (
    CallKey,
    KeyCounter,
    is_checkpointed,
    is_in_forward,
    locate,
)


class Entry(NamedTuple):
    """A call site of a caller, the name of its unit, and what it calls.

    Attributes:
        is_module: whether it calls a module.
        source: the activation that the unit has been made for; None: a formula of several tensors.
    """

    key: CallKey
    unit: str
    is_module: bool
    source: Activation | None


def hidden_units(table: tuple[Entry, ...]) -> property:
    """``_modules`` of a caller, without its units where its own code may walk over them."""
    units = {entry.unit for entry in table}

    def read(self: nn.Module) -> dict[str, nn.Module | None]:
        held: dict[str, nn.Module | None] = vars(self)["_modules"]
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if not any(isinstance(mode, Interceptor) and mode.caller is self for mode in modes):
            return held
        return {name: child for name, child in held.items() if name not in units}

    return property(read, lambda self, value: vars(self).update(_modules=value))


class Interceptor(TorchFunctionMode):
    """Sends the listed activation calls of a caller to their units while its code runs.

    An activation call that is not among those `seen` at conversion stays what it is, with a
    warning.
    """

    def __init__(
        self, caller: nn.Module, table: tuple[Entry, ...], seen: frozenset[CallKey]
    ) -> None:
        super().__init__()
        self._seen = seen
        self.caller, self._counter, self._tracker = caller, KeyCounter(), Tracker()
        self._entries = {(entry.key, entry.is_module): entry for entry in table}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        record, match, single = self._tracker.call(func, args, kwargs)
        call = match or single
        unit = None if call is None else self._unit_here(call.activation)
        if call is None or unit is None:
            result = func(*args, **kwargs)
        else:
            if is_checkpointed(self.caller) and (self.caller.training or torch.is_grad_enabled()):
                raise RuntimeError(
                    f"{self.caller.get_submodule(unit).path}: its caller calls it inside "
                    "torch.utils.checkpoint, whose recomputation would not see the gates. Call a "
                    "child module inside checkpoint instead, or convert without this site "
                    "(exclude=)."
                )
            result = self.caller.get_submodule(unit)(call.input, *call.operands)
        self._tracker.made(record, func, args, result)
        return result

    def _unit_here(self, activation: Activation) -> str | None:
        """The unit of the running call, if the caller itself or an activation module makes it."""
        places = locate()
        depth = next((i for i, (_, module) in enumerate(places) if module is self.caller), None)
        if depth is None or depth > 1:
            return None
        inner = places[0][1]
        if depth == 1 and (any(True for _ in inner.children()) or not is_in_forward(inner)):
            return None
        key = self._counter.key(places[depth][0])
        entry = self._entries.get((key, depth == 1))
        is_other = entry is not None and entry.source not in (None, activation)
        if is_other or (depth == 0 and key not in self._seen):
            function, line, *_ = key.location[0]
            warnings.warn(
                f"{type(self.caller).__name__} calls {activation} ({function}, line {line + 1} of "
                "it) in a branch that did not run when the model was converted: it has no gates. "
                "Revert, and convert in the state and with an example_input that take this branch.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None if entry is None or is_other else entry.unit
