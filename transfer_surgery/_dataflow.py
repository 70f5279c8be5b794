"""Which modules write and read a tensor: seen in one run of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self

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


class OutsideReads(TorchFunctionMode):
    """Finds modules whose own parameters are read by something else than their calls.

    Args:
        modules: those that are looked at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.read_elsewhere: set[nn.Module] = set()
        self._modules = set(modules)
        self._owners = {id(p): m for m in self._modules for p in m.parameters(recurse=False)}
        self._running: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self._modules:
            begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
            end = module.register_forward_hook(self._end, with_kwargs=True, always_call=True)
            self._handles += [begin, end]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(module)

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made:  # not where only a dtype or a device is asked for
            self._see(func, args, kwargs or {}, result, made)
        return result

    def _see(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any, made: list[Tensor]
    ) -> None:
        """A call that made tensors."""
        self._note_owners((args, kwargs), self._running)

    def _note_owners(self, values: Any, running: Iterable[nn.Module | None]) -> None:
        owners = {self._owners.get(id(leaf)) for leaf in tree_leaves(values)}
        self.read_elsewhere.update(m for m in owners if m is not None and m not in running)


class Readers(OutsideReads):
    """Who reads each tensor: modules that are looked at, or a call outside of them (None).

    Args:
        modules: those that are looked at.
        norms: norms for which only the call with their weight counts as the writer of a tensor.
    """

    def __init__(self, modules: Iterable[nn.Module], norms: Iterable[Any]) -> None:
        super().__init__(modules)
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.read: dict[int, list[nn.Module | None]] = {}
        self._kept: list[Any] = []  # so that no other tensor gets the same id
        self._norms = {id(norm.weight): norm for norm in norms if norm.weight is not None}
        self._owners |= {
            id(p): norm for norm in self._norms.values() for p in norm.parameters(recurse=False)
        }

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running:
            self._note((args, kwargs), module)
        super()._begin(module, args, kwargs)

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        super()._end(module, args, kwargs, output)
        (given, *_) = (*args, *kwargs.values())
        self.calls.setdefault(module, []).append((given, output))
        self._kept.append(output)

    def _see(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any, made: list[Tensor]
    ) -> None:
        if func in _PASSING and result is args[0]:
            return
        norm = self._norms.get(id(kwargs.get("weight"))) if func in _NORM_CALLS else None
        self._note_owners((args, kwargs), (*self._running, norm))
        if not self._running:
            self._note((args, kwargs), None)
            self._kept.append(result)
            if norm is not None:
                self.calls.setdefault(norm, []).append((args[0], result))

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
