"""Which modules of a stand-in run, and what its code does with the tables of its modules."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from transfer_surgery.activations import Match
from transfer_surgery.sites.call_location import CallKey, locate
from transfer_surgery.sites.children import CHANGES, NAMED_MODULES, Children, reading_code
from transfer_surgery.sites.frames import call_frames, is_users
from transfer_surgery.sites.holders import swap_for_twins
from transfer_surgery.sites.listed import LISTED_NAMES
from transfer_surgery.sites.observation import Event, Frame, Observation
from transfer_surgery.sites.place import IN_THREAD, UNREGISTERED
from transfer_surgery.sites.site import ActivationChild
from transfer_surgery.sites.stacks import Stacks
from transfer_surgery.sites.tensor_facts import mark_constant
from transfer_surgery.sites.trace import Called, find_route, names_below
from transfer_surgery.sites.unseen import scripted_functions
from transfer_surgery.sites.unwatched import Unwatched
from transfer_surgery.units import class_name


class ModuleObserver(TorchFunctionMode, ABC):
    """Follows the modules of a probe by hooks; it is a mode in each thread that they run in.

    Args:
        probe: the stand-in of a model.
        reads_graph: whether to find out what runs unseen, by the graph of a run with gradients.
        has_twins: whether to replace activation modules, to see whether the replacements run.
    """

    def __init__(self, probe: nn.Module, reads_graph: bool, has_twins: bool) -> None:
        super().__init__()
        self.probe, self.observation = probe, Observation(unwatched=Unwatched(reads_graph))
        self.around = Frame("", probe, None, (), (), {}, is_around=True)
        self._stacks = Stacks()
        self._twins = swap_for_twins(probe) if has_twins else None
        self._handles: list[RemovableHandle] = []
        self.paths = {id(module): path for path, module in probe.named_modules()}
        for module, twin in (self._twins or {}).items():
            self.paths[id(module)] = self.paths[id(twin)]
        for module in list(probe.modules()):
            if type(vars(module).get("_modules")) is dict:
                vars(module)["_modules"] = Children(module._modules, partial(self._walk, module))
            for tensor in tensors_in(vars(module)):  # also those it keeps in plain lists
                mark_constant(tensor)
            if isinstance(module, torch.jit.ScriptModule):
                self.observation.scripted.add(self.paths[id(module)])
            else:
                enter = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                # Hooks of the model's own run outside of forward: before, and after this one.
                # What fails is left too: the code around it may go on.
                leave = module.register_forward_hook(self._leave, prepend=True, always_call=True)
                self._handles += [enter, leave]

    @property
    def frame(self) -> Frame:
        """The module that runs in this thread."""
        return self._stacks.here[-1] if self._stacks.here else self.around

    @abstractmethod
    def is_untouched(self, event: Event) -> bool:
        """Whether the result of an activation has not been changed in place since."""

    def let_go(self) -> None:
        """Take the hooks, and what watches the tables, out of the probe."""
        for handle in self._handles:
            handle.remove()
        for module in self.probe.modules():
            if type(vars(module).get("_modules")) is Children:
                vars(module)["_modules"] = dict.copy(module._modules)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called_from, called_by = [*locate(), ((), None)][1]
        if self._stacks.here:
            self._stacks.here[-1].children += 1
        path = self.paths.get(id(module))
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
            self.observation.walked_from_outside.add(self.paths[id(module)])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._stacks.here or self._stacks.here[-1].module is not module:
            return  # a copy that the forward makes, or a hook before `_enter` has failed
        frame = self._stacks.here.pop()
        if self._stacks.is_new_thread:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        event = frame.only_activation(output)
        if self._stacks.callers and event is not None and self.is_untouched(event):
            self._count_as_call(frame, event)
        else:
            self.observation.add(frame)

    def _count_as_call(self, frame: Frame, event: Event) -> None:
        """A module that is an activation and nothing else counts as a call of its caller."""
        caller = self._stacks.callers[-1]
        event.caller, event.module, event.kind = caller.path, frame.path, "module"
        if self._twins is None or frame.module in self._twins:
            self.observation.irreplaceable.add(frame.path)
        self.trace(event, caller.module, (frame.module, names_below(caller.path, frame.path)))
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

    def trace(
        self, event: Event, caller: nn.Module, called: Called, match: Match | None = None
    ) -> None:
        """Note where in the source, or in a graph, a call is, and how it can be edited there."""
        frames = call_frames(caller)
        if frames:
            event.file, event.line = frames[-1].f_code.co_filename, frames[-1].f_lineno
        event.route, event.why, expression = find_route(caller, frames, called, match)
        if expression is not None:
            self.observation.expressions.add(expression)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in a tree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
