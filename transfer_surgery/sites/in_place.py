"""What is written in place: which inputs of activations change, and which are read again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from transfer_surgery.activations import overwrites
from transfer_surgery.sites.observation import Event
from transfer_surgery.sites.tensor_facts import is_live, mark_live, memory_of


class InPlace:
    """Follows memory through one run of a model and tells the events what happens to theirs."""

    def __init__(self) -> None:
        self._overwritten: dict[int, tuple[Tensor, Event]] = {}
        self._written: dict[int, Tensor] = {}
        self._inputs: dict[int, list[Event]] = {}
        self._kept: list[Tensor] = []  # memory is known by its address while it is held

    def note_event(self, event: Event, x: Tensor) -> None:
        """An activation call has this input."""
        self._kept.append(x)
        self._inputs.setdefault(memory_of(x), []).append(event)

    def note_overwritten(self, event: Event, x: Tensor) -> None:
        """The call has written its result into its input."""
        self._overwritten[memory_of(x)] = x, event

    def note_writes(self, func: Any, inputs: list[Tensor]) -> None:
        """What something live is written into is live from then on, with all of its views."""
        for x in inputs:
            if self._written and memory_of(x) in self._written:
                mark_live(x)
        if overwrites(func) and any(map(is_live, inputs[1:])):
            mark_live(inputs[0])
            self._written[memory_of(inputs[0])] = inputs[0]
        if overwrites(func) and inputs:
            for event in self._inputs.get(memory_of(inputs[0]), ()):
                event.input_changes = True

    def note_reads(self, value: Any) -> None:
        """An input that was overwritten in place is read again: its new value matters."""
        for leaf in pytree.tree_leaves(value):
            if self._overwritten and isinstance(leaf, Tensor):
                _, event = self._overwritten.get(memory_of(leaf), (None, None))
                if event is not None:
                    event.overwrites_input = True
