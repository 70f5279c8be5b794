"""What one forward pass of a model shows: the order of modules, their neighbours, the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from transfer_surgery._dataflow import norms_behind
from transfer_surgery._running import hooked


@dataclass(frozen=True)
class Probe:
    """What was seen in one forward pass.

    Attributes:
        calls: how often each module in question was called, in the order of the first calls.
        norms: the batch norm behind a layer, where there is one.
        read_elsewhere: the layers whose parameters something else reads, too.
        held: the most bytes that were alive when one of the modules was called.
        output: what the model returned.
    """

    calls: dict[nn.Module, int]
    norms: dict[nn.Module, nn.Module]
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
        layers: the layers among them whose weights and norms are in question.
        run: calls the model.
    """
    watch = _Watch(model, layers)
    outputs: list[Any] = []

    def observed() -> None:
        handles = [m.register_forward_pre_hook(watch.begin) for m in modules]
        handles += [m.register_forward_hook(watch.end, always_call=True) for m in modules]
        with hooked(*handles), watch:
            outputs.append(run())

    norms = norms_behind(model, layers, observed)
    return Probe(watch.calls, norms, frozenset(watch.read), watch.held, outputs[0])


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.calls: dict[nn.Module, int] = {}
        self.read: set[nn.Module] = set()
        self.held = 0
        self._inside: list[nn.Module] = []
        self._owner = {id(p): layer for layer in layers for p in layer.parameters(recurse=False)}
        self._own = {_address(p) for p in model.parameters() if type(p) is nn.Parameter}
        self._alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def begin(self, module: nn.Module, args: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1
        self._inside.append(module)
        storages = {_address(t): t.untyped_storage().nbytes() for t in self._alive.values()}
        held = sum(size for address, size in storages.items() if address not in self._own)
        self.held = max(self.held, held)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            if type(tensor) is Tensor and tensor.layout is torch.strided:
                self._alive[id(tensor)] = tensor
        if made:  # not where only a dtype or a device is asked for
            for leaf in tree_leaves((args, kwargs)):
                owner = self._owner.get(id(leaf))
                if owner is not None and owner not in self._inside:
                    self.read.add(owner)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
