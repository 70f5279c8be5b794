"""Which modules write and read a tensor: seen in one run of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from transfer_surgery._running import hooked

_PASSING = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
"""In evaluation they give back what they get."""
_NORM_CALLS = (F.batch_norm, F.group_norm)
"""Of modules that do more than their norm, such as timm's BatchNormAct2d."""


def norms_behind(
    model: nn.Module, layers: Iterable[nn.Module], run: Callable[[], Any]
) -> dict[nn.Module, nn.Module]:
    """The batch norm that reads the output of a layer, where both are called once.

    Args:
        model: the model that contains the layers.
        layers: the layers in question.
        run: calls the model.
    """
    outputs: dict[nn.Module, list[weakref.ref[Tensor]]] = {layer: [] for layer in layers}
    inputs: dict[nn.Module, list[nn.Module | None]] = {}

    def read(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        writers = [layer for layer, seen in outputs.items() if seen and seen[-1]() is args[0]]
        inputs[norm].append(writers[0] if writers else None)

    handles = [
        layer.register_forward_hook(lambda m, _, output: outputs[m].append(weakref.ref(output)))
        for layer in outputs
    ]
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            inputs[norm] = []
            handles.append(norm.register_forward_pre_hook(read))
    with hooked(*handles):
        run()
    once = {norm: writers[0] for norm, writers in inputs.items() if len(writers) == 1}
    return {layer: norm for norm, layer in once.items() if layer and len(outputs[layer]) == 1}


class Readers(TorchFunctionMode):
    """Who reads each tensor: modules that are looked at, or a call outside of them (None).

    Args:
        modules: those that are looked at.
        norms: norms for which only the call with their weight counts as the writer of a tensor.
    """

    def __init__(self, modules: set[nn.Module], norms: Iterable[Any]) -> None:
        super().__init__()
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.read: dict[int, list[nn.Module | None]] = {}
        self._kept: list[Any] = []  # so that no other tensor gets the same id
        self._handles: list[RemovableHandle] = []
        self._inside = 0
        self._modules = modules
        self._norms = {id(norm.weight): norm for norm in norms if norm.weight is not None}

    def __enter__(self) -> Readers:
        for module in self._modules:
            begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            end = module.register_forward_hook(self._end, with_kwargs=True)
            self._handles += [begin, end]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            self._note((args, kwargs), module)
        self._inside += 1

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        self._inside -= 1
        (given, *_) = (*args, *kwargs.values())
        self.calls.setdefault(module, []).append((given, output))
        self._kept.append(output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PASSING and result is args[0]:
            return result
        if not self._inside and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._note((args, kwargs), None)
            self._kept.append(result)
            if func in _NORM_CALLS and id(weight := (kwargs or {}).get("weight")) in self._norms:
                norm = self._norms[id(weight)]
                self.calls.setdefault(norm, []).append((args[0], result))
                for own in norm.parameters(recurse=False):
                    if known := self.read.get(id(own)):
                        known.remove(None)
        return result

    def note_output(self, output: Any) -> None:
        """What the model returns is read by the caller."""
        self._note(output, None)

    def _note(self, values: Any, reader: nn.Module | None) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._kept.append(leaf)
                self.read.setdefault(id(leaf), []).append(reader)

    def writer(self, tensor: Tensor) -> nn.Module | None:
        """The module whose output this is."""
        return next(
            (m for m, calls in self.calls.items() if any(y is tensor for _, y in calls)), None
        )

    def is_read(self, tensor: Tensor) -> bool:
        """Whether a parameter is read outside of the calls of the modules that are looked at."""
        return bool(self.read.get(id(tensor)))

    def only_reader(self, tensor: Tensor) -> nn.Module | None:
        readers = self.read.get(id(tensor), [])
        return readers[0] if len(readers) == 1 else None
