"""What the finder writes down: activation calls, and the module calls that they happen in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from transfer_surgery.activations import Activation
from transfer_surgery.sites.call_location import CallKey, KeyCounter, Location
from transfer_surgery.sites.graph import GraphRoute
from transfer_surgery.sites.plain import is_plain
from transfer_surgery.sites.route import Expression, Route
from transfer_surgery.sites.site import ActivationChild
from transfer_surgery.sites.tensor_facts import NOT_LIVE, SQUASHING, is_live, origin_of
from transfer_surgery.sites.unwatched import Unwatched


@dataclass
class Event:
    """One activation call site as seen in one training mode.

    `readers` are the calls that read the result, `absorbed` those of them that are part of a
    formula; `repeats` are further calls from the same place. `is_norm`: a square or an exponential
    that is summed up. `is_read`: something in the network takes the result, or what is made of it
    alone, together with other values. `is_cap`: it is ``c * tanh(x / c)``, within bounds.
    """

    caller: str
    key: CallKey
    source: Activation
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    inplace: bool
    role: str
    reason: str | None
    order: int
    file: str = ""
    line: int = 0
    route: Route | GraphRoute | None = None
    why: str | None = None
    module: str | None = None
    overwrites_input: bool = False
    input_changes: bool = False
    calls: int = 0
    input: Tensor | None = field(default=None, repr=False)
    output: Tensor | None = field(default=None, repr=False)
    is_norm: bool = False
    is_read: bool = False
    is_cap: bool = False
    readers: set[Any] = field(default_factory=set, repr=False)
    absorbed: set[Any] = field(default_factory=set, repr=False)
    repeats: list[Event] = field(default_factory=list, repr=False)

    @property
    def is_part(self) -> bool:
        """Whether all that reads the result belongs to the formula of another activation."""
        alone = bool(self.readers) and self.readers <= self.absorbed
        return (alone or self.is_norm) and all(event.is_part for event in self.repeats)

    def clash(self, other: Event) -> str | None:
        """Why gates made for this call do not fit another one from the same place."""
        if self.channel_axis > 0 and len(self.shape) != len(other.shape):
            return f"its calls see {len(self.shape)} and {len(other.shape)} axes"
        ours, theirs = ((*one.shape[self.channel_axis :], "no")[0] for one in (self, other))
        return None if ours == theirs else f"its calls see {ours} and {theirs} channels"

    def forget(self) -> None:
        """Let go of tensors, when all that they tell is known."""
        self.input = self.output = None
        self.readers, self.absorbed = set(), set()

    def fields(self) -> dict[str, Any]:
        """The part of a `Site` that an event knows."""
        names = ["source", "kind", "shape", "channel_axis", "inplace", "role", "reason", "module"]
        names += ["file", "line", "route", "why", "overwrites_input", "calls"]
        changes = any(event.input_changes for event in (self, *self.repeats))
        return {name: getattr(self, name) for name in names} | {"input_changes": changes}


@dataclass
class Observation:
    """All sites of one run, and what was seen in the code of each caller."""

    events: dict[tuple[str, CallKey], Event] = field(default_factory=dict)
    keys: dict[str, set[CallKey]] = field(default_factory=dict)
    modules: dict[str, dict[str, ActivationChild]] = field(default_factory=dict)
    expressions: set[Expression] = field(default_factory=set)
    """Of all activation calls."""
    scripted: set[str] = field(default_factory=set)
    """What is TorchScript, where nothing can be seen."""
    walked: set[str] = field(default_factory=set)
    """Callers whose code looks at the table of their children."""
    walked_from_outside: set[str] = field(default_factory=set)
    """Callers at whose children the code of another module looks."""
    walkers: set[str] = field(default_factory=set)
    """Classes whose code walks over modules or parameters below it."""
    irreplaceable: set[str] = field(default_factory=set)
    """Activation modules that the code reaches in places where a unit cannot be put."""
    unwatched: Unwatched = field(default_factory=Unwatched)

    def sites(self) -> list[Event]:
        """The sites in the order of their first calls; callers are complete in another order."""
        return sorted(self.events.values(), key=lambda event: event.order)

    def settle(self, output: Any) -> None:
        """What only the end of the run tells: which activations make the model's outputs."""
        self.events = {key: one for key, one in self.events.items() if not one.is_part}
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        leaves = [leaf for leaf in leaves if leaf.is_floating_point() and is_live(leaf)]
        returned, heads = {id(x) for x in leaves}, {id(origin_of(x)) for x in leaves}
        for event in self.sites():
            calls = (event, *event.repeats)
            # Of several outputs each is a head's own, where nothing in the network reads it too.
            is_head = len(returned) > 1 and not any(one.is_read for one in calls)
            is_head &= event.role in ("hidden", "gating") and any(id(one) in heads for one in calls)
            if is_head or (id(event.output) in returned and event.source.name in SQUASHING):
                event.role = "output"
        if not any(event.role == "hidden" for event in self.sites()):
            for event in self.sites():  # a cap is the one activation that there is
                event.role = "hidden" if event.is_cap else event.role

    def add(self, frame: Frame) -> None:
        """Add what was seen in one call of a module."""
        for event in frame.events:
            self._count(event)
        if frame.events:
            self.keys.setdefault(frame.path, set()).update(frame.keys)
            self.modules.setdefault(frame.path, {}).update(frame.modules)

    def _count(self, event: Event) -> None:
        seen = self.events.setdefault((event.caller, event.key), event)
        seen.calls += 1
        if seen is not event:
            seen.repeats.append(event)
            event.input = event.output = None
        if seen.reason == NOT_LIVE:  # the first of a loop may start from a constant
            seen.reason = event.reason
        seen.overwrites_input |= event.overwrites_input
        seen.reason = seen.clash(event) or seen.reason


@dataclass
class Frame:
    """One running call of a module."""

    path: str
    module: nn.Module
    called_by: nn.Module | None
    called_from: Location
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_around: bool = False  # it is no call, but all that is outside of any forward
    counter: KeyCounter = field(default_factory=KeyCounter)
    listed: KeyCounter = field(default_factory=KeyCounter)
    events: list[Event] = field(default_factory=list)
    children: int = 0
    keys: list[CallKey] = field(default_factory=list)
    modules: dict[str, ActivationChild] = field(default_factory=dict)

    def draw_key(self, location: Location, calls: int = 1) -> CallKey:
        """The key of an activation call of this module, the last of several at one place."""
        self.keys.append([self.counter.key(location) for _ in range(calls)][-1])
        return self.keys[-1]

    def draw_listed_key(self, location: Location) -> CallKey:
        """The key of a call that is listed only: not counted with those that can be converted."""
        return CallKey(location, -1 - self.listed.key(location).number)

    def only_activation(self, output: Any) -> Event | None:
        """The activation of its input that is all that the module did; None where there is more."""
        events = [event for event in self.events if not event.is_part]
        # Not by `children()`, which would be noted as the network's own walk.
        held = any(child is not None for child in dict.values(self.module._modules))
        if len(events) != 1 or self.children or held:
            return None
        inputs, event = (*self.args, *self.kwargs.values()), events[0]
        stateless = not self.module._parameters and not self.module._buffers
        is_all = bool(inputs) and inputs[0] is event.input and output is event.output
        return event if stateless and is_all and is_plain(self.module) else None
