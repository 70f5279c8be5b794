"""What one forward pass of a model shows: the order of modules, their neighbours, the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._dataflow import OutsideReads, norms_behind
from transfer_surgery.matching.two_networks.block_sums import SumSearch


@dataclass(frozen=True)
class Probe:
    """What was seen in one forward pass.

    Attributes:
        calls: how often each module in question was called, in the order of the first calls.
        norms: the batch norm behind a layer, where there is one.
        sums: the layers whose outputs are added to another tensor, and do nothing else.
        read_elsewhere: the layers whose parameters something else reads, too.
        held: the most bytes that were alive when one of the modules was called, or a sum was made.
        output: what the model returned.
    """

    calls: dict[nn.Module, int]
    norms: dict[nn.Module, nn.Module]
    sums: frozenset[nn.Module]
    read_elsewhere: frozenset[nn.Module]
    held: int
    output: Any


def probe(
    model: nn.Module,
    modules: Collection[nn.Module],
    layers: Collection[nn.Module],
    run: Callable[[], Any],
) -> Probe:
    """Run a model once and look at it.

    Args:
        model: the model.
        modules: those that are to be counted, sites and layers.
        layers: the layers among them whose weights, norms and sums are in question.
        run: calls the model.
    """
    sums = SumSearch(layers)
    watch = _Watch(model, modules, sums)
    outputs: list[Any] = []

    def observed() -> None:
        with watch:
            outputs.append(run())
        sums.returned(outputs[0])

    norms = norms_behind(model, layers, observed)
    read = watch.read_elsewhere.intersection(layers)
    return Probe(watch.calls, norms, frozenset(sums.found), frozenset(read), watch.held, outputs[0])


class _Watch(OutsideReads):
    def __init__(
        self,
        model: nn.Module,
        modules: Collection[nn.Module],
        sums: SumSearch,
    ) -> None:
        super().__init__(modules)
        self._sums = sums
        self.calls: dict[nn.Module, int] = {}
        self.held = 0
        self._own = {_address(p) for p in model.parameters() if type(p) is nn.Parameter}
        self._alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin(module, args, kwargs)
        self.calls[module] = self.calls.get(module, 0) + 1
        self._note_held()
        self._sums.begin(module)

    def _note_held(self) -> None:
        storages = {_address(t): t.untyped_storage().nbytes() for t in self._alive.values()}
        held = sum(size for address, size in storages.items() if address not in self._own)
        self.held = max(self.held, held)

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        super()._end(module, args, kwargs, output)
        self._sums.end(module, (args, kwargs), output)

    def _see(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any, made: list[Tensor]
    ) -> None:
        super()._see(func, args, kwargs, result, made)
        if self._sums.call(func, args, kwargs, result):
            self._note_held()
        for tensor in made:
            if type(tensor) is Tensor and tensor.layout is torch.strided:
                self._alive[id(tensor)] = tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
