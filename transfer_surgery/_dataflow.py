"""Which modules write, read and share a tensor: seen in one run of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from transfer_surgery._running import hooked

_PASSING = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
"""In evaluation they give back what they get."""
_NORM_CALLS = (F.batch_norm, F.group_norm)
"""Of modules that do more than their norm, such as timm's BatchNormAct2d."""


def sharing_parameters(model: nn.Module) -> set[nn.Module]:
    """The modules that have a parameter which another module has, too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return {module for several in owners.values() if len(several) > 1 for module in several}


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
        self._inside = 0
        self._modules = modules
        self._norms = {id(norm.weight): norm for norm in norms if norm.weight is not None}

    def __enter__(self) -> Readers:
        self._handles = [m.register_forward_pre_hook(self._begin) for m in self._modules]
        self._handles += [m.register_forward_hook(self._end) for m in self._modules]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._inside:
            self._note(args, module)
        self._inside += 1

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._inside -= 1
        self.calls.setdefault(module, []).append((args[0], output))
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
                self.calls.setdefault(self._norms[id(weight)], []).append((args[0], result))
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

    def only_reader(self, tensor: Tensor) -> nn.Module | None:
        readers = self.read.get(id(tensor), [])
        return readers[0] if len(readers) == 1 else None
