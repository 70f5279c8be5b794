"""What would be converted: one `Site` per activation call in the code, collected in a `Plan`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transfer_surgery._table import Column, Table
from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.sites.site import ROLES, CallerCode, Site
from transfer_surgery.units import select

_NO_CALLS = (
    "The forward pass called no known activation. @register_activation(name) makes yours known by "
    "its values; with calls=, also a function of another library; register_formula(name, text) one "
    "with learned tensors."
)


@dataclass(frozen=True, repr=False)
class Plan(Table[Site]):
    """The sites of a model in the order in which they first run, as a table.

    Attributes:
        rows: all sites found, convertible or not; those that only run in training come last.
        failures: for each training mode in which the model did not run, a sentence that says why.
        unexamined: what could not be examined, and which calls are intercepted, with the reasons.
        calls: for each caller, what was seen in its code.
        walkers: the classes whose forward walks over the modules or parameters below it.
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

    failures: tuple[str, ...] = ()
    unexamined: tuple[str, ...] = ()
    calls: Mapping[str, CallerCode] = field(default_factory=dict)
    walkers: frozenset[str] = frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"note: {note}" for note in (*self.failures, *self.unexamined))

    def to_dict(self) -> dict[str, Any]:
        rows = [site.to_dict() for site in self.rows]
        return {
            "version": self.version,
            "rows": rows,
            "unexamined": [*self.failures, *self.unexamined],
        }

    def __getitem__(self, path: str) -> Site:
        for site in self.rows:
            if site.path == path:
                return site
        raise KeyError(f"no site {path!r}; the plan has {', '.join(s.path for s in self.rows)}")

    def call_number(self, site: Site, chosen: Collection[str]) -> tuple[int, int] | None:
        """Which of the activation calls in its caller's code a site is, as (number, of how many).

        Args:
            site: a site of the plan.
            chosen: paths of the sites that are converted.

        Returns:
            What tells whether a name such as ``relu_0`` still means the same call, once the code
            has a new one. None for a site that is a child module.
        """
        if site.way == "child":
            return None
        calls = {key for keys in self.calls[site.caller].keys.values() for key in keys}
        own = (s for s in self.rows if s.caller == site.caller and s.way != "child")
        calls |= {s.key for s in own if s.path in chosen}
        # By position, seen from the caller's ``forward``: line numbers alone change too easily.
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
            return "\n".join([*self.notes, _NO_CALLS])
        return f"Asked for roles={roles}; the sites found are:\n{self}"


def _as_tuple(value: Any) -> tuple[Any, ...]:
    single = isinstance(value, (str, type, Activation)) or not isinstance(value, Iterable)
    return (value,) if single else tuple(value)


def _is_source(site: Site, source: str | Activation) -> bool:
    """A bare name means any parameters; ``"leaky_relu(negative_slope=0.2)"`` these ones."""
    if isinstance(source, str) and "(" not in source:
        return site.source.name == get_activation(source).name
    return site.source == get_activation(source)
