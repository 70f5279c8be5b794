"""One activation call in the code of a module, and what was seen in that code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from transfer_surgery.activations import Activation
from transfer_surgery.sites.call_location import CallKey
from transfer_surgery.sites.graph import GraphRoute
from transfer_surgery.sites.route import Expression, Route
from transfer_surgery.units import Granularity, PerLayer, granularity_of, is_selected

ROLES = ("hidden", "gating", "output", "bounding")
"""``hidden`` feeds the next layer; ``gating`` multiplies another tensor; ``output`` is returned;
``bounding`` keeps coordinates and the like within limits."""


@dataclass(frozen=True)
class CallerCode:
    """What was seen in the code of a caller."""

    keys: Mapping[str, frozenset[CallKey]]
    """For each examined mode, the activation calls in the caller's code, sites or not."""
    modules: Mapping[str, ActivationChild]
    """The activation modules that the caller called, by their paths in the model."""
    unseen: tuple[tuple[Expression, str], ...] = ()
    """Activation calls that are written in functions to edit, but did not run."""


class ActivationChild(NamedTuple):
    """A module that does nothing but one activation, and the number of known calls in it."""

    activation: Activation
    calls: int


@dataclass(frozen=True)
class Site:
    """One activation call in the code of one module, its caller.

    Attributes:
        path: where its gated unit will live.
        caller: path of the module whose ``forward`` makes the call; ``""`` is the model.
        kind: ``"module"``, ``"function"``, ``"method"``, or ``"formula"``: several calls that
            together are one activation.
        source: the activation that is called.
        role: one of `ROLES`.
        shape: shape of its input in the example, batch first.
        channel_axis: axis of the channels in that shape; the last one is -1, 0 stands for none.
        inplace: whether the call overwrites its input.
        overwrites_input: whether the overwritten input is read again later.
        input_changes: whether the input is written to after the call, by something else.
        calls: how often it runs in one forward.
        modes: the training modes in which it runs, of ``("eval", "train")``.
        file: the source file with the call; empty where there is none.
        line: its line there.
        way: ``"child"`` (a child module is replaced), ``"edit"`` (the call is replaced in the
            source of the function that makes it), ``"fx"`` (in the graph of a ``GraphModule``) or
            ``"intercept"`` (the call is redirected while the original code runs).
        why: why the call is not edited; None where it is, and for children.
        reason: why it cannot be converted; None where it can.
        module: path of the activation module that is called, None for functions and methods.
        caller_type: type of the caller.
        module_type: type of the activation module, None for functions and methods.
        key: its identity within the caller's code.
        route: where the source or the graph has to be edited; None for other ways.
    """

    path: str
    caller: str
    kind: str
    source: Activation
    role: str
    shape: tuple[int, ...]
    channel_axis: int
    inplace: bool
    overwrites_input: bool
    input_changes: bool
    calls: int
    modes: tuple[str, ...]
    file: str
    line: int
    way: str
    why: str | None
    reason: str | None
    module: str | None
    caller_type: type[nn.Module]
    module_type: type[nn.Module] | None
    key: CallKey = field(repr=False)
    route: Route | GraphRoute | None = field(repr=False, default=None)

    def granularity(self, wanted: str | Granularity) -> Granularity:
        """What a granularity means at this site.

        A short form means one gate where the input has no axis of channels or features.

        Raises:
            ValueError: an object asks for an axis that the input does not have.
        """
        found, dims = granularity_of(wanted, self.channel_axis), len(self.shape)
        if isinstance(found, PerLayer) or (dims > 1 and max(found.axes(dims), default=0) > 0):
            return found
        if isinstance(wanted, str):
            return PerLayer()
        raise ValueError(
            f"{self.path}: its input {self.shape} has no axis for {found!r}. Use one gate "
            f"there: granularity={{{self.path!r}: 'layer', '*': 'channel'}}."
        )

    @property
    def neurons(self) -> int:
        """Number of elements of the feature shape."""
        return math.prod(self.shape[1:])

    def matches(self, pattern: Any) -> bool:
        """Whether a glob on paths, a module type or a predicate selects this site."""
        return is_selected(self.path, self, pattern, self.types)

    @property
    def types(self) -> tuple[type[nn.Module], ...]:
        """The types of the caller and, if there is one, of the activation module."""
        return (self.caller_type, *([self.module_type] if self.module_type else []))

    @property
    def call(self) -> str:
        """The kind of the call, and whether it works in place."""
        return f"{self.kind}{' (in place)' if self.inplace else ''}"

    @property
    def where(self) -> str:
        """File and line of the call; empty where there is none."""
        return self.file and f"{Path(self.file).name}:{self.line}"

    @property
    def outcome(self) -> str:
        """How it is converted, or why it is not."""
        return self.way if self.reason is None else f"not converted: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """What is known of the site, as plain numbers and strings."""
        names = (field.name for field in fields(self) if field.name not in _INTERNAL)
        return {name: _plain(getattr(self, name)) for name in names}


_INTERNAL = ("key", "route")


def _plain(value: Any) -> Any:
    """Activations and types by their names, tuples as lists."""
    if isinstance(value, tuple):
        return [*value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, Activation) else value
