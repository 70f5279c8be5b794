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

from transfer_surgery.activations import Activation, Call, recognise
from transfer_surgery.location import CallKey, KeyCounter, Location, locate
from transfer_surgery.plan import Leaf

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
_UNSUPPORTED = {
    F.prelu: ("prelu", "its slope is a learned parameter"),
    F.rrelu: ("rrelu", "its slope is random"),
    F.glu: ("glu", "it multiplies two halves of its input"),
}


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
    module: str | None = None
    overwrites_input: bool = False
    calls: int = 0
    input: Tensor | None = field(default=None, repr=False)
    output: Tensor | None = field(default=None, repr=False)

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

    def sites(self) -> list[Event]:
        """The sites in the order of their first calls; owners are complete in another order."""
        return sorted(self.events.values(), key=lambda event: event.order)

    def add(self, event: Event) -> None:
        seen = self.events.setdefault((event.owner, event.key), event)
        seen.calls += 1
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

    def is_one_activation(self, output: Any) -> bool:
        """Whether the module did nothing but one activation of its input."""
        if len(self.events) != 1 or self.children or any(True for _ in self.module.children()):
            return False
        (event,) = self.events
        inputs = (*self.args, *self.kwargs.values())
        stateless = not self.module._parameters and not self.module._buffers
        return stateless and bool(inputs) and inputs[0] is event.input and output is event.output


class Observer(TorchFunctionMode):
    """Runs a probe and records its activation calls."""

    def __init__(self, probe: nn.Module) -> None:
        super().__init__()
        self.probe, self.observation = probe, Observation()
        self._stack: list[_Frame] = []
        self._order = itertools.count()
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
            event.key = caller.counter.key(frame.called_from)
            caller.events.append(event)
            return
        for event in frame.events:
            self.observation.add(event)
        if frame.events and frame.path not in self.observation.arguments:
            template = pytree.tree_map_only(
                Tensor, lambda _: Leaf.TENSOR, (frame.args, frame.kwargs)
            )
            names = {id(child): name for name, child in frame.module.named_modules()}
            self.observation.arguments[frame.path] = template
            self.observation.children[frame.path] = tuple(
                names.get(id(child), "?") for child in frame.children
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _recognise_any(func, args, kwargs)
        if call is None or not self._stack or not isinstance(call.input, Tensor):
            out = func(*args, **kwargs)
        else:  # out of place, so that the input and the output can be told apart
            out = call.activation(call.input) if call.inplace else func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if outputs:
            self._note_reads(inputs)
            _follow(getattr(func, "__name__", ""), inputs, outputs)
        if call is not None and self._stack and isinstance(call.input, Tensor):
            self._record(func, call, out)
        return out

    def _record(self, func: Callable[..., Any], call: Call, out: Tensor) -> None:
        frame, x = self._stack[-1], call.input
        reason = _UNSUPPORTED[func][1] if func in _UNSUPPORTED else None
        if not getattr(x, "_ts_live", True):
            reason = "it does not depend on the input"
        elif "forward" in vars(frame.module):
            reason = "its owner's forward is replaced on the instance"
        event = Event(
            owner=frame.path,
            key=frame.counter.key(locate()[0][0]),
            source=call.activation,
            kind="method" if getattr(torch.Tensor, func.__name__, None) is func else "function",
            shape=tuple(x.shape),
            channel_axis=_channel_axis(x),
            inplace=call.inplace,
            role="gating" if call.activation.name in _BOUNDED else "hidden",
            reason=reason,
            order=next(self._order),
            input=x,
            output=out,
        )
        frame.events.append(event)
        if call.inplace:
            self._overwritten[x.untyped_storage()._cdata] = (x, event)
        if event.role == "gating":
            out._ts_sigmoid = event  # type: ignore[attr-defined]

    def _note_reads(self, value: Any) -> None:
        """An input that was overwritten in place is read again: its new value matters."""
        for leaf in pytree.tree_leaves(value):
            if self._overwritten and isinstance(leaf, Tensor):
                _, event = self._overwritten.get(leaf.untyped_storage()._cdata, (None, None))
                if event is not None:
                    event.overwrites_input = True


def _recognise_any(func: Any, args: Any, kwargs: Any) -> Call | None:
    if func in _UNSUPPORTED:
        return Call(Activation(_UNSUPPORTED[func][0]), args[0] if args else None, False)
    return recognise(func, args, kwargs)


def _follow(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Carry the facts from the inputs of a torch call to its outputs."""
    live = any(getattr(x, "_ts_live", True) for x in inputs)
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
        facts._ts_live = live
        facts._ts_sigmoid = sigmoid if len(inputs) == 1 and not layer else None


def _channel_axis(x: Tensor) -> int:
    """From the layer that produced ``x``; else 1 for images and volumes, -1 for tokens."""
    axis = getattr(x, "_ts_axis", None)
    if axis is None:
        return 1 if x.dim() >= 4 else -1
    return int(axis)
