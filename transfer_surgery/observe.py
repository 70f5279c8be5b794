"""What the finder sees: activation calls, and what flows into and out of them.

Each tensor of the run carries a few facts: where its channels are, whether it depends on the
model's input, and which sigmoid it comes from. The facts follow the rules measured on both zoos.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from transfer_surgery.activations import Activation, Call, get_activation, recognise
from transfer_surgery.formulas import Match, Record, Tracker
from transfer_surgery.location import CallKey, KeyCounter, Location, locate
from transfer_surgery.plan import ActivationChild, Leaf

__all__ = ["Event", "Observation", "Observer"]

_CHANNELS_FIRST = {
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *("batch_norm", "group_norm", "instance_norm"),
}
_CHANNELS_LAST = {"linear", "layer_norm", "rms_norm", "embedding", "bilinear"}
_RESHAPES = {
    *("reshape", "view", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis"),
    *("swapaxes", "swapdims", "squeeze", "unsqueeze", "t", "matmul", "bmm", "einsum", "__matmul__"),
}
_BOUNDED = {"sigmoid", "hardsigmoid"}
_OUTPUTS = _BOUNDED | {"tanh", "hardtanh", "softplus"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_FUSED = "it is inside a fused kernel, which takes no other activation"
_LISTED = {
    F.rrelu: ("rrelu", "its slope is random"),
    F.glu: ("glu", "it multiplies two halves of its input"),
    torch.lstm: ("lstm", _FUSED),
    torch.gru: ("gru", _FUSED),
    torch.rnn_tanh: ("rnn_tanh", _FUSED),
    torch.rnn_relu: ("rnn_relu", _FUSED),
    torch.lstm_cell: ("lstm_cell", _FUSED),
    torch.gru_cell: ("gru_cell", _FUSED),
    torch.rnn_tanh_cell: ("rnn_tanh_cell", _FUSED),
    torch.rnn_relu_cell: ("rnn_relu_cell", _FUSED),
}
"""Calls that are listed with a reason and never converted."""


@dataclass
class Event:
    """One activation call site as seen in one training mode."""

    owner: str
    key: CallKey
    source: Activation
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    inplace: bool
    role: str
    reason: str | None
    order: int
    listed: bool = False
    module: str | None = None
    overwrites_input: bool = False
    calls: int = 0
    input: Tensor | None = field(default=None, repr=False)
    output: Tensor | None = field(default=None, repr=False)
    readers: set[Any] = field(default_factory=set, repr=False)
    absorbed: set[Any] = field(default_factory=set, repr=False)

    repeats: list[Event] = field(default_factory=list, repr=False)

    @property
    def is_part(self) -> bool:
        """Whether all that reads the result belongs to the formula of another activation."""
        alone = bool(self.readers) and self.readers <= self.absorbed
        return alone and all(event.is_part for event in self.repeats)

    def fields(self) -> dict[str, Any]:
        """The part of a `Site` that an event knows."""
        names = ("source", "kind", "shape", "channel_axis", "inplace", "role", "reason", "module")
        return {n: getattr(self, n) for n in (*names, "overwrites_input", "calls")}


@dataclass
class Observation:
    """All sites of one run, the arguments of each owner and the children that it called."""

    events: dict[tuple[str, CallKey], Event] = field(default_factory=dict)
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    children: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keys: dict[str, set[CallKey]] = field(default_factory=dict)
    modules: dict[str, dict[str, ActivationChild]] = field(default_factory=dict)

    def sites(self) -> list[Event]:
        """The sites in the order of their first calls; owners are complete in another order."""
        events = (event for event in self.events.values() if not event.is_part)
        return sorted(events, key=lambda event: event.order)

    def add(self, event: Event) -> None:
        seen = self.events.setdefault((event.owner, event.key), event)
        seen.calls += 1
        if seen is not event:
            seen.repeats.append(event)
            event.input = event.output = None
        seen.overwrites_input |= event.overwrites_input
        channels = seen.shape[seen.channel_axis :][:1], event.shape[event.channel_axis :][:1]
        if channels[0] != channels[1]:
            seen.reason = f"its calls see {channels[0][0]} and {channels[1][0]} channels"


@dataclass
class _Frame:
    """One running call of a module."""

    path: str
    module: nn.Module
    called_from: Location
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counter: KeyCounter = field(default_factory=KeyCounter)
    events: list[Event] = field(default_factory=list)
    children: list[nn.Module] = field(default_factory=list)
    keys: list[CallKey] = field(default_factory=list)
    modules: dict[str, ActivationChild] = field(default_factory=dict)

    def draw_key(self, location: Location, calls: int = 1) -> CallKey:
        """The key of an activation call of this module, the last of several at one place."""
        self.keys.append([self.counter.key(location) for _ in range(calls)][-1])
        return self.keys[-1]

    def is_one_activation(self, output: Any) -> bool:
        """Whether the module did nothing but one activation of its input."""
        events = [event for event in self.events if not event.is_part]
        if len(events) != 1 or self.children or any(True for _ in self.module.children()):
            return False
        inputs = (*self.args, *self.kwargs.values())
        stateless = not self.module._parameters and not self.module._buffers
        (event,) = self.events = events
        return stateless and bool(inputs) and inputs[0] is event.input and output is event.output


class Observer(TorchFunctionMode):
    """Runs a probe and records its activation calls."""

    def __init__(self, probe: nn.Module) -> None:
        super().__init__()
        self.probe, self.observation = probe, Observation()
        self._stack: list[_Frame] = []
        self._order = itertools.count()
        self._tracker = Tracker()
        self._overwritten: dict[int, tuple[Tensor, Event]] = {}
        self._paths = {id(module): path for path, module in probe.named_modules()}
        for tensor in (*probe.parameters(), *probe.buffers()):
            tensor._ts_live = False  # type: ignore[attr-defined]
        for module in probe.modules():
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], fake: FakeTensorMode | None
    ) -> Observation:
        with torch.no_grad(), fake or contextlib.nullcontext(), self:
            output = self.probe(*args, **kwargs)
        self._note_reads(output)
        returned = {id(leaf) for leaf in pytree.tree_leaves(output)}
        for event in self.observation.sites():
            if id(event.output) in returned and event.source.name in _OUTPUTS:
                event.role = "output"
        return self.observation

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = locate()
        called_from: Location = places[1][0] if len(places) > 1 else ()
        if self._stack:
            self._stack[-1].children.append(module)
        self._stack.append(_Frame(self._paths[id(module)], module, called_from, args, kwargs))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._stack.pop()
        if self._stack and frame.is_one_activation(output):
            caller, event = self._stack[-1], frame.events[0]
            event.owner, event.module, event.kind = caller.path, frame.path, "module"
            if event.listed:
                event.key = CallKey(frame.called_from, -1 - len(caller.events))
            else:
                event.key = caller.draw_key(frame.called_from, len(frame.keys))
                child = ActivationChild(event.source, len(frame.keys))
                caller.modules[frame.path] = child
            caller.events.append(event)
            return
        for event in frame.events:
            self.observation.add(event)
        if not frame.events:
            return
        observation = self.observation
        observation.keys.setdefault(frame.path, set()).update(frame.keys)
        observation.modules.setdefault(frame.path, {}).update(frame.modules)
        if frame.path not in observation.arguments:
            template = pytree.tree_map_only(
                Tensor, lambda _: Leaf.TENSOR, (frame.args, frame.kwargs)
            )
            names = {id(child): name for name, child in frame.module.named_modules()}
            observation.arguments[frame.path] = template
            observation.children[frame.path] = tuple(
                names.get(id(child), "?") for child in frame.children
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        call, record, match = self._read(func, args, kwargs)
        if call is not None and call.inplace:
            # out of place, so that the input and the output can be told apart
            out = call.activation(call.input, *call.operands)
        else:
            out = func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for x in inputs:
            known = self._tracker.known(x)
            if known is not None and known.event is not None and outputs:
                known.event.readers.add(record or object())
        for parent, inner in match.inner if match else ():
            if inner.event is not None:
                inner.event.absorbed.add(parent)
        self._tracker.made(record, func, args, out)
        if outputs:
            self._note_reads(inputs)
            _follow(getattr(func, "__name__", ""), inputs, outputs)
        if call is not None:
            event = self._record(func, call, match, out)
            if record is not None:
                record.event = event
        return out

    def _read(
        self, func: Any, args: Any, kwargs: Any
    ) -> tuple[Call | None, Record | None, Match | None]:
        """What a torch call means: an activation, maybe, and maybe the end of a formula."""
        if not self._stack:
            return None, None, None
        record, match = self._tracker.call(func, args, kwargs)
        if match is not None:
            call: Call | None = Call(match.activation, match.input, match.inplace, match.operands)
            if any(getattr(x, "_ts_zero", False) for x in match.operands):
                relu = get_activation("relu", written="maximum(x, zero)")
                call = Call(relu, match.input, match.inplace, match.operands)
        elif func in _LISTED:
            call = Call(Activation(_LISTED[func][0]), args[0] if args else None, False)
        else:
            call = recognise(func, args, kwargs)
        if call is not None and not isinstance(call.input, Tensor):
            call = None
        return call, record, match

    def _record(
        self, func: Callable[..., Any], call: Call, match: Match | None, out: Any
    ) -> Event | None:
        frame, x = self._stack[-1], call.input
        location = locate()[0][0]
        listed = func in _LISTED
        key = CallKey(location, -1 - len(frame.events)) if listed else frame.draw_key(location)
        live = _is_live(x)
        if match is not None and (not live or any(_is_live(x) for x in match.operands)):
            return None  # it looks like a formula, but its operand is no learned tensor
        reason = _LISTED[func][1] if listed else None
        if not live:
            reason = "it does not depend on the input"
        elif not x.is_floating_point():
            reason = f"its input is {x.dtype}"
        elif "forward" in vars(frame.module):
            reason = "its owner's forward is replaced on the instance"
        kind = "method" if getattr(Tensor, func.__name__, None) is func else "function"
        event = Event(
            owner=frame.path,
            key=key,
            source=call.activation,
            kind="formula" if match else kind,
            shape=tuple(x.shape),
            channel_axis=_channel_axis(x),
            inplace=call.inplace,
            role=_role(call.activation, x),
            reason=reason,
            order=next(self._order),
            listed=listed,
            input=x,
            output=out,
        )
        frame.events.append(event)
        if call.inplace:
            self._overwritten[x.untyped_storage()._cdata] = (x, event)
        if event.role == "gating" and isinstance(out, Tensor):
            out._ts_sigmoid = event  # type: ignore[attr-defined]
        return event

    def _note_reads(self, value: Any) -> None:
        """An input that was overwritten in place is read again: its new value matters."""
        for leaf in pytree.tree_leaves(value):
            if self._overwritten and isinstance(leaf, Tensor):
                _, event = self._overwritten.get(leaf.untyped_storage()._cdata, (None, None))
                if event is not None:
                    event.overwrites_input = True


def _is_live(x: Tensor) -> bool:
    """Whether a tensor depends on the model's input; new tensors are inputs."""
    return getattr(x, "_ts_live", True)


def _role(activation: Activation, x: Tensor) -> str:
    if activation.name in _BOUNDED:
        return "gating"
    written = str(dict(activation.parameters).get("written", ""))
    is_clamp = activation.name in ("clamp", "tlu") or written.startswith(("clamp", "maximum"))
    # Of what comes straight from a layer a clamp at 0 is an activation; else it bounds coordinates.
    from_layer = getattr(x, "_ts_axis", None) is not None and activation.name != "clamp"
    return "bounding" if is_clamp and not from_layer else "hidden"


def _follow(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Carry the facts from the inputs of a torch call to its outputs."""
    live = any(_is_live(x) for x in inputs) and name not in _ZEROS
    like = max(inputs, key=Tensor.numel, default=None)
    layer = name in _CHANNELS_FIRST or name in _CHANNELS_LAST
    sigmoid = getattr(inputs[0], "_ts_sigmoid", None) if inputs else None
    if layer and sigmoid is not None:
        sigmoid.role = "hidden"  # it feeds the next layer instead of multiplying something
    for out in outputs:
        facts: Any = out
        if name in _CHANNELS_FIRST:
            facts._ts_axis = 1
        elif name in _CHANNELS_LAST:
            facts._ts_axis = -1
        elif name in _RESHAPES or like is None or like.dim() != out.dim():
            facts._ts_axis = None
        else:
            facts._ts_axis = getattr(like, "_ts_axis", None)
        facts._ts_live, facts._ts_zero = live, name in _ZEROS
        facts._ts_sigmoid = sigmoid if len(inputs) == 1 and not layer else None


def _channel_axis(x: Tensor) -> int:
    """From the layer that produced ``x``; else 1 for images and volumes, -1 for tokens."""
    axis = getattr(x, "_ts_axis", None)
    if axis is None:
        return 1 if x.dim() >= 4 else -1
    return int(axis)
