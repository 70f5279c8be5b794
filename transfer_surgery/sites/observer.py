"""The observer: runs a stand-in of the model and sees every torch call in it."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from transfer_surgery.activations import (
    Activation,
    Call,
    Match,
    Record,
    Tracker,
    get_activation,
    name_of,
)
from transfer_surgery.sites.by_hand import BY_HAND, ByHand, is_by_hand, note_soft_cap
from transfer_surgery.sites.in_place import InPlace
from transfer_surgery.sites.listed import LISTED_NAMES, listed_call, why_listed
from transfer_surgery.sites.module_observer import ModuleObserver, tensors_in
from transfer_surgery.sites.observation import Event, Observation
from transfer_surgery.sites.place import OUTSIDE, UNREGISTERED, place_of
from transfer_surgery.sites.tensor_facts import (
    channel_axis,
    follow,
    is_known,
    is_live,
    is_reduction,
    is_zero,
    mark_live,
    role_of,
    why_not,
)


class Observer(ModuleObserver):
    """Runs a probe and records its activation calls.

    Args:
        probe: the stand-in of a model.
        reads_graph: whether to find out what runs unseen, by the graph of a run with gradients.
        has_twins: whether to replace activation modules, to see whether the replacements run.
    """

    def __init__(self, probe: nn.Module, reads_graph: bool = False, has_twins: bool = True) -> None:
        super().__init__(probe, reads_graph, has_twins)
        self._order, self._tracker = itertools.count(), Tracker()
        self._in_place, self._by_hand = InPlace(), ByHand()
        self._failed = ""
        self._events: list[Event] = []
        self._made: list[weakref.ref[Tensor]] = []

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fake: FakeTensorMode | None,
        gradients: bool,
    ) -> Observation:
        for x in tensors_in((args, kwargs)):
            mark_live(x)
        with torch.set_grad_enabled(gradients), fake or contextlib.nullcontext(), self:
            output = self.probe(*args, **kwargs)
        if fake is not None and self._failed:  # it was caught, and the code went another way
            raise RuntimeError(self._failed)
        self.observation.unwatched.note_given(tensors_in(output))
        self.observation.add(self.around)
        self._in_place.note_reads((output, [vars(module) for module in self.probe.modules()]))
        self.observation.settle(output)
        return self.observation

    def close(self) -> list[weakref.ref[Tensor]]:
        """Let go of the probe and of all tensors; returns what tells which of those live on."""
        self.let_go()
        for event in self._events:
            event.forget()
        self.observation.unwatched.close()
        return self._made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        self.observation.unwatched.note_given(inputs)
        call, record, match = self._read(func, args, kwargs)
        if call is not None and call.inplace:
            # out of place, so that the input and the output can be told apart
            out = call.activation(call.input, *call.operands)
            call.input.data.copy_(out)  # the code may look at it
        else:
            try:
                out = func(*args, **kwargs)
            except Exception as error:
                self._failed = f"{name_of(func)} failed: {error}"
                raise
        outputs = tensors_in(out)
        made = [x for x in outputs if not any(x is one for one in inputs)]
        made += [x for x in inputs if isinstance(x, FakeTensor) and not is_known(x)]  # in threads
        self._made += map(weakref.ref, made)
        self.observation.unwatched.note_made(outputs, call and call.activation.name)
        self._in_place.note_writes(func, inputs)
        for x in inputs:
            known = self._tracker.known(x)
            if known is not None and known.event is not None and outputs:
                known.event.readers.add(record or object())
                if is_reduction(name_of(func)) and is_by_hand(known):
                    known.event.is_norm |= not any(map(is_by_hand, known.given))
        for parent, inner in match.inner if match else ():
            if inner.event is not None:
                inner.event.absorbed.add(parent)
        self._tracker.made(record, func, args, out)
        listed = why_listed(func, kwargs)
        event = None if call is None else self._record(func, call, match, out, listed)
        if record is not None:
            record.event = event
        if outputs:
            self._in_place.note_reads(inputs)
            text = next((one for one in args if isinstance(one, str)), "")
            follow(name_of(func), inputs, outputs, event, text)
        if record is not None and call is None and isinstance(out, Tensor):
            self._note_by_hand(func, record, out)
            note_soft_cap(record)
        if call is not None and event is not None and call.inplace:
            self._in_place.note_overwritten(event, call.input)
        return out

    def _read(
        self, func: Any, args: Any, kwargs: Any
    ) -> tuple[Call | None, Record | None, Match | None]:
        """What a torch call means: an activation, maybe, and maybe the end of a formula."""
        record, match, call = self._tracker.call(func, args, kwargs)
        if match is not None:
            if not is_live(match.input) or any(map(is_live, match.operands)):
                # It looks like a formula, but what should be a learned tensor is not. The call
                # counts all the same: the interceptor does not know better.
                frame = self.frame
                frame.draw_key(place_of(frame, self.paths).location)
                return None, record, None
            activation = match.activation
            if any(map(is_zero, match.operands)):
                activation = get_activation("relu", variant="maximum(x, zero)")
            return Call(activation, match.input, match.inplace, match.operands), record, match
        if why_listed(func, kwargs):
            call = listed_call(func, args, kwargs)
        return call if call and isinstance(call.input, Tensor) else None, record, None

    def _note_by_hand(self, func: Callable[..., Any], record: Record, out: Any) -> None:
        """List a formula that is no known activation; it takes the place of its beginnings."""
        found = self._by_hand.bent(record, out)
        if found is None:
            return
        root, why = found
        call = Call(Activation(BY_HAND), root.value, False)
        record.event = self._record(func, call, None, out, why)
        for one in record.given:
            if is_live(one.value) and is_by_hand(one):
                one.event.absorbed.add(record)

    def _record(
        self,
        func: Callable[..., Any],
        call: Call,
        match: Match | None,
        out: Any,
        listed: str | None = None,
    ) -> Event:
        """Write down an activation call; one that is only `listed` has the reason already."""
        x, frame = call.input, self.frame
        place = place_of(frame, self.paths)
        if place.reason in (OUTSIDE, UNREGISTERED):
            listed = place.reason
        draw = frame.draw_key if listed is None else frame.draw_listed_key
        kind = "method" if getattr(Tensor, func.__name__, None) is func else "function"
        kind = "formula" if match else "module" if place.called else kind
        event = Event(
            caller=self.paths[id(place.caller)],
            key=draw(place.location),
            source=call.activation,
            kind=kind,
            shape=() if x.is_nested else tuple(x.shape),
            channel_axis=channel_axis(x),
            inplace=call.inplace,
            role=role_of(call.activation, x),
            reason=why_not(x) or place.reason or listed,
            order=next(self._order),
            input=x,
            output=out,
        )
        self.trace(event, place.caller, place.called or call, match)
        if listed is not None:
            event.route = event.why = None
        frame.events.append(event)
        self._events.append(event)
        self._in_place.note_event(event, x)
        return event

    def is_untouched(self, event: Event) -> bool:
        """Whether the result of an activation has not been changed in place since."""
        record = self._tracker.known(event.output)
        return event.source.name in LISTED_NAMES or (record is not None and record.event is event)
