"""The observer: runs a stand-in of the model and sees every torch call and module call in it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

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
from transfer_surgery.sites.call_location import CallKey, locate
from transfer_surgery.sites.children import CHANGES, NAMED_MODULES, Children, reading_code
from transfer_surgery.sites.frames import call_frames, is_users
from transfer_surgery.sites.holders import swap_for_twins
from transfer_surgery.sites.in_place import InPlace
from transfer_surgery.sites.listed import LISTED_NAMES, listed_call, why_listed
from transfer_surgery.sites.observation import Event, Frame, Observation
from transfer_surgery.sites.place import IN_THREAD, OUTSIDE, UNREGISTERED, place_of
from transfer_surgery.sites.site import ActivationChild
from transfer_surgery.sites.stacks import Stacks
from transfer_surgery.sites.tensor_facts import (
    channel_axis,
    follow,
    is_known,
    is_live,
    is_reduction,
    is_zero,
    mark_constant,
    mark_live,
    role_of,
    why_not,
)
from transfer_surgery.sites.trace import Called, find_route, names_below
from transfer_surgery.sites.unseen import scripted_functions
from transfer_surgery.sites.unwatched import Unwatched
from transfer_surgery.units import class_name


class Observer(TorchFunctionMode):
    """Runs a probe and records its activation calls.

    Args:
        probe: the stand-in of a model.
        reads_graph: whether to find out what runs unseen, by the graph of a run with gradients.
        has_twins: whether to replace activation modules, to see whether the replacements run.
    """

    def __init__(self, probe: nn.Module, reads_graph: bool = False, has_twins: bool = True) -> None:
        super().__init__()
        self.probe, self.observation = probe, Observation(unwatched=Unwatched(reads_graph))
        self._around = Frame("", probe, None, (), (), {}, is_around=True)
        self._stacks = Stacks()
        self._order, self._tracker = itertools.count(), Tracker()
        self._in_place, self._by_hand = InPlace(), ByHand()
        self._twins = swap_for_twins(probe) if has_twins else None
        self._failed = ""
        self._events: list[Event] = []
        self._made: list[weakref.ref[Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._paths = {id(module): path for path, module in probe.named_modules()}
        for module, twin in (self._twins or {}).items():
            self._paths[id(module)] = self._paths[id(twin)]
        for module in list(probe.modules()):
            if type(vars(module).get("_modules")) is dict:
                vars(module)["_modules"] = Children(module._modules, partial(self._walk, module))
            for tensor in _tensors(vars(module)):  # also those it keeps in plain lists
                mark_constant(tensor)
            if isinstance(module, torch.jit.ScriptModule):
                self.observation.scripted.add(self._paths[id(module)])
            else:
                enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                # Hooks of the model's own run outside of forward: before, and after this one.
                # What fails is left too: the code around it may go on.
                leave = module.register_forward_hook(self._leave, prepend=True, always_call=True)
                self._handles += [enter, leave]

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fake: FakeTensorMode | None,
        gradients: bool,
    ) -> Observation:
        for x in _tensors((args, kwargs)):
            mark_live(x)
        with torch.set_grad_enabled(gradients), fake or contextlib.nullcontext(), self:
            output = self.probe(*args, **kwargs)
        if fake is not None and self._failed:  # it was caught, and the code went another way
            raise RuntimeError(self._failed)
        self.observation.unwatched.note_given(_tensors(output))
        self.observation.add(self._around)
        self._in_place.note_reads((output, [vars(module) for module in self.probe.modules()]))
        self.observation.settle(output)
        return self.observation

    def close(self) -> list[weakref.ref[Tensor]]:
        """Let go of the probe and of all tensors; returns what tells which of those live on."""
        for handle in self._handles:
            handle.remove()
        for module in self.probe.modules():
            if type(vars(module).get("_modules")) is Children:
                vars(module)["_modules"] = dict.copy(module._modules)
        for event in self._events:
            event.forget()
        self.observation.unwatched.close()
        return self._made

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called_from, called_by = [*locate(), ((), None)][1]
        if self._stacks.here:
            self._stacks.here[-1].children += 1
        path = self._paths.get(id(module))
        if path is None:
            return  # a copy that the forward makes
        for name in scripted_functions(module):
            self.observation.scripted.add(f"{path or 'the model'} calls {name}, which")
        if self._stacks.is_new_thread:
            self.__enter__()  # type: ignore[no-untyped-call]  # modes are of one thread
        self._stacks.here.append(Frame(path, module, called_by, called_from, args, kwargs))

    def _walk(self, module: nn.Module) -> None:
        """Note that something reads the table of a module's children."""
        reader = reading_code()
        if reader is None or reader in CHANGES or reader.co_filename == copy.__file__:
            return
        if not self._stacks.here:
            return
        running = self._stacks.here[-1]
        if reader is NAMED_MODULES:
            self.observation.walkers.add(class_name(running.module))
        if running.module is module:
            self.observation.walked.add(running.path)
        elif is_users(reader.co_filename):
            self.observation.walked_from_outside.add(self._paths[id(module)])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._stacks.here or self._stacks.here[-1].module is not module:
            return  # a copy that the forward makes, or a hook before `_enter` has failed
        frame = self._stacks.here.pop()
        if self._stacks.is_new_thread:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        event = frame.only_activation(output)
        if self._stacks.callers and event is not None and self._is_untouched(event):
            self._count_as_call(frame, event)
        else:
            self.observation.add(frame)

    def _count_as_call(self, frame: Frame, event: Event) -> None:
        """A module that is an activation and nothing else counts as a call of its caller."""
        caller = self._stacks.callers[-1]
        event.caller, event.module, event.kind = caller.path, frame.path, "module"
        if self._twins is None or frame.module in self._twins:
            self.observation.irreplaceable.add(frame.path)
        self._trace(event, caller.module, (frame.module, names_below(caller.path, frame.path)))
        if not self._stacks.here:
            event.route, event.why, event.file, event.line = None, IN_THREAD, "", 0
        elif frame.called_by is not caller.module:
            event.route, event.why = None, UNREGISTERED
        if not self._stacks.here:
            event.key = CallKey(((frame.path, 0, 0, 0, 0),), 0)
        elif event.source.name in LISTED_NAMES:
            event.key = caller.draw_listed_key(frame.called_from)
        else:
            event.key = caller.draw_key(frame.called_from, len(frame.keys))
            caller.modules[frame.path] = ActivationChild(event.source, len(frame.keys))
        caller.events.append(event)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
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
        outputs = _tensors(out)
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
                frame = self._frame()
                frame.draw_key(place_of(frame, self._paths).location)
                return None, record, None
            activation = match.activation
            if any(map(is_zero, match.operands)):
                activation = get_activation("relu", variant="maximum(x, zero)")
            return Call(activation, match.input, match.inplace, match.operands), record, match
        if why_listed(func, kwargs):
            call = listed_call(func, args, kwargs)
        return call if call and isinstance(call.input, Tensor) else None, record, None

    def _frame(self) -> Frame:
        return self._stacks.here[-1] if self._stacks.here else self._around

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
        x, frame = call.input, self._frame()
        place = place_of(frame, self._paths)
        if place.reason in (OUTSIDE, UNREGISTERED):
            listed = place.reason
        draw = frame.draw_key if listed is None else frame.draw_listed_key
        kind = "method" if getattr(Tensor, func.__name__, None) is func else "function"
        kind = "formula" if match else "module" if place.called else kind
        event = Event(
            caller=self._paths[id(place.caller)],
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
        self._trace(event, place.caller, place.called or call, match)
        if listed is not None:
            event.route = event.why = None
        frame.events.append(event)
        self._events.append(event)
        self._in_place.note_event(event, x)
        return event

    def _trace(
        self, event: Event, caller: nn.Module, called: Called, match: Match | None = None
    ) -> None:
        """Note where in the source, or in a graph, a call is, and how it can be edited there."""
        frames = call_frames(caller)
        if frames:
            event.file, event.line = frames[-1].f_code.co_filename, frames[-1].f_lineno
        event.route, event.why, expression = find_route(caller, frames, called, match)
        if expression is not None:
            self.observation.expressions.add(expression)

    def _is_untouched(self, event: Event) -> bool:
        """Whether the result of an activation has not been changed in place since."""
        record = self._tracker.known(event.output)
        return event.source.name in LISTED_NAMES or (record is not None and record.event is event)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
