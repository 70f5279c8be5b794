"""What would be converted: one `Site` per activation call in the code, collected in a `Plan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from transfer_surgery._table import Column, Table
from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.sites.call_location import CallKey
from transfer_surgery.sites.graph import GraphRoute
from transfer_surgery.sites.route import Expression, Route
from transfer_surgery.units import Granularity, granularity_of, is_selected, select

ROLES = ("hidden", "gating", "output", "bounding")
"""``hidden`` feeds the next layer; ``gating`` multiplies another tensor; ``output`` is returned;
``bounding`` keeps coordinates and the like within limits."""


@dataclass(frozen=True)
class OwnerCall:
    """What was seen in the code of an owner."""

    keys: Mapping[str, frozenset[CallKey]]
    """For each examined mode, the activation calls in the owner's code, sites or not."""
    modules: Mapping[str, ActivationChild]
    """The activation modules that the owner called, by their paths in the model."""
    unseen: tuple[tuple[Expression, str], ...] = ()
    """Activation calls that are written in functions to edit, but did not run."""


class ActivationChild(NamedTuple):
    """A module that does nothing but one activation, and the number of known calls in it."""

    activation: Activation
    calls: int


@dataclass(frozen=True)
class Site:
    """One activation call in the code of one module, its owner.

    Attributes:
        path: where its gated unit will live.
        owner: path of the module whose ``forward`` makes the call; ``""`` is the model.
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
        owner_type: type of the owner.
        module_type: type of the activation module, None for functions and methods.
        key: its identity within the owner's code.
        route: where the source or the graph has to be edited; None for other ways.
    """

    path: str
    owner: str
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
    owner_type: type[nn.Module]
    module_type: type[nn.Module] | None
    key: CallKey = field(repr=False)
    route: Route | GraphRoute | None = field(repr=False, default=None)

    def gate_shape(self, granularity: str | Granularity) -> tuple[int, ...]:
        """Shape of the gates: ``(1,)`` per layer, ``(C,)`` per channel, or the feature shape."""
        return granularity_of(granularity, self.channel_axis).gate_shape(self.shape)

    @property
    def neurons(self) -> int:
        """Number of elements of the feature shape."""
        return math.prod(self.shape[1:])

    def matches(self, pattern: Any) -> bool:
        """Whether a glob on paths, a module type or a predicate selects this site."""
        return is_selected(self.path, self, pattern, self.types)

    @property
    def types(self) -> tuple[type[nn.Module], ...]:
        """The types of the owner and, if there is one, of the activation module."""
        return (self.owner_type, *([self.module_type] if self.module_type else []))

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


@dataclass(frozen=True, repr=False)
class Plan(Table[Site]):
    """The sites of a model in the order in which they first run, as a table.

    Attributes:
        rows: all sites found, convertible or not; those that only run in training come last.
        unexamined: what could not be examined, and which calls are intercepted, with the reasons.
        calls: for each owner, what was seen in its code.
    """

    columns = (
        Column("path"),
        Column("source", "activation", str),
        Column("call", "kind"),
        Column("role"),
        Column("shape", text=lambda shape: "x".join(map(str, shape))),
        Column("channel_axis", "axis"),
        Column("calls"),
        Column("where"),
        Column("outcome", "way"),
    )

    unexamined: tuple[str, ...] = ()
    calls: Mapping[str, OwnerCall] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"note: {note}" for note in self.unexamined)

    def to_dict(self) -> dict[str, Any]:
        rows = [site.to_dict() for site in self.rows]
        return {"version": self.version, "rows": rows, "unexamined": [*self.unexamined]}

    def __getitem__(self, path: str) -> Site:
        for site in self.rows:
            if site.path == path:
                return site
        raise KeyError(f"no site {path!r}; the plan has {', '.join(s.path for s in self.rows)}")

    def call_number(self, site: Site, chosen: Collection[str]) -> tuple[int, int] | None:
        """Which of the activation calls in its owner's code a site is, as (number, of how many).

        Args:
            site: a site of the plan.
            chosen: paths of the sites that are converted.

        Returns:
            What tells whether a name such as ``relu_0`` still means the same call, once the code
            has a new one. None for a site that is a child module.
        """
        if site.way == "child":
            return None
        calls = {key for keys in self.calls[site.owner].keys.values() for key in keys}
        own = (s for s in self.rows if s.owner == site.owner and s.way != "child")
        calls |= {s.key for s in own if s.path in chosen}
        # By position, seen from the owner's ``forward``: line numbers alone change too easily.
        order = sorted(calls, key=lambda call: (call.location[::-1], call.number))
        return order.index(site.key) + 1, len(order)

    def filter(self, keep: Callable[[Site], bool]) -> Plan:
        """A plan with the sites for which ``keep(site)`` is true."""
        return replace(self, rows=tuple(site for site in self.rows if keep(site)))

    def select(
        self,
        *,
        source: str | Activation | Iterable[str | Activation] | None = None,
        include: Any = None,
        exclude: Any = None,
        roles: Iterable[str] = ("hidden",),
    ) -> Plan:
        """The convertible sites that match; see `transfer_surgery.convert` for the arguments.

        Raises:
            ValueError: a source, pattern or role that matches nothing, or nothing is left.
        """
        roles = _as_tuple(roles)
        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise ValueError(f"unknown role {unknown[0]!r}; known: {', '.join(ROLES)}.")
        plan = self.filter(lambda site: site.role in roles)
        if source is not None:
            sources = _as_tuple(source)
            for one in sources:
                self._must_match(f"source={str(one)!r}", partial(_is_source, source=one))
            plan = plan.filter(lambda site: any(_is_source(site, s) for s in sources))
        sites = {site.path: site for site in self.rows}
        chosen = select(sites, include, exclude, lambda path: sites[path].types)
        plan = plan.filter(lambda site: site.path in chosen and site.reason is None)
        if not plan.rows:
            raise ValueError(f"no activation left to convert.\n{self._why_nothing(roles)}")
        return plan

    def _must_match(self, what: str, matches: Callable[[Site], bool]) -> None:
        if not any(matches(site) for site in self.rows):
            known = ", ".join(f"{site.path} ({site.source})" for site in self.rows[:20])
            raise ValueError(f"{what} matches none of the {len(self)} sites: {known}")

    def _why_nothing(self, roles: tuple[str, ...]) -> str:
        if not self.rows:
            return (
                "The forward pass called no known activation. @register_activation(name) makes "
                "yours known by its values; with calls=, also a function of another library; "
                "register_formula(name, text) one with learned tensors."
            )
        return f"Asked for roles={roles}; the sites found are:\n{self}"


def _plain(value: Any) -> Any:
    """Activations and types by their names, tuples as lists."""
    if isinstance(value, tuple):
        return [*value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, Activation) else value


def _as_tuple(value: Any) -> tuple[Any, ...]:
    single = isinstance(value, (str, type, Activation)) or not isinstance(value, Iterable)
    return (value,) if single else tuple(value)


def _is_source(site: Site, source: str | Activation) -> bool:
    """A bare name means any parameters; ``"leaky_relu(negative_slope=0.2)"`` these ones."""
    if isinstance(source, str) and "(" not in source:
        return site.source.name == get_activation(source).name
    return site.source == get_activation(source)
