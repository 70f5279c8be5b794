"""Which layer writes the input of a site, and which one reads its output, alone: from one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from transfer_surgery.units import FittedActivation, TargetParameters

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PASSING = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
"""In evaluation they give back what they get."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
_NORM_CALLS = (F.batch_norm, F.group_norm)
"""Of modules that do more than their norm, such as timm's BatchNormAct2d."""


@dataclass
class Neighbours:
    """The layers around a site that its numbers can go to; None with the reason as a name."""

    before: Any  # nn.Module | None, but with the weight and bias that these layers have
    before_name: str
    after: Any
    after_name: str


def find_neighbours(
    model: nn.Module, sites: Mapping[str, FittedActivation], run: Callable[[], Any]
) -> dict[str, Neighbours]:
    """The neighbours of each site, by its path.

    Args:
        model: a baked model in evaluation mode.
        sites: its matched targets.
        run: calls it.
    """
    # Only the classes of torch itself: what a subclass computes, nobody knows, but for its norm.
    known = (nn.Linear, *CONVOLUTIONS, *_NORMS)
    layers = {m: path for path, m in model.named_modules() if type(m) in known}
    norms = {m: path for path, m in model.named_modules() if isinstance(m, _NORMS)}
    with _Readers({*layers, *sites.values()}, [m for m in norms if m not in layers]) as readers:
        readers.note_output(run())
    shared = _sharing_parameters(model)
    layers |= norms
    return {path: _around(site, layers, readers, shared) for path, site in sites.items()}


def _around(
    site: FittedActivation,
    layers: Mapping[nn.Module, str],
    readers: _Readers,
    shared: set[nn.Module],
) -> Neighbours:
    calls = readers.calls.get(site, [])
    if len(calls) != 1:
        reason = f"(called {len(calls)} times)"
        return Neighbours(None, reason, None, reason)
    x, y = calls[0]
    found: list[tuple[Any, str]] = []
    layer: Any
    for tensor, layer in ((x, readers.writer(x)), (y, readers.only_reader(y))):
        behind = tensor is y
        if len(readers.read.get(id(tensor), [])) > 1:
            found.append((None, "(several readers)"))
        elif layer not in layers or (behind and isinstance(layer, _NORMS)):
            found.append((None, "(no layer there)"))
        elif len(readers.calls[layer]) > 1 or layer in shared:
            found.append((None, f"({layers[layer]} is shared)"))
        elif layer.weight is None or not _along_channels(site.fitted, tensor, layer):
            found.append((None, f"({layers[layer]} has another axis)"))
        elif not layer.weight.is_floating_point() or _has_hooks(layer):
            found.append((None, f"({layers[layer]} has hooks)"))
        else:
            found.append((layer, layers[layer]))
    return Neighbours(*found[0], *found[1])


def _along_channels(fitted: TargetParameters, x: Tensor, layer: Any) -> bool:
    """Whether there is one number for all of `x`, or one per channel of the layer."""
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return False
    axis = x.dim() - 1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
    if isinstance(layer, CONVOLUTIONS) and x.dim() < layer.weight.dim():
        return False  # without an axis of examples
    return fitted.granularity.axes(x.dim()) in ((), (axis,))


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _sharing_parameters(model: nn.Module) -> set[nn.Module]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return {module for several in owners.values() if len(several) > 1 for module in several}


class _Readers(TorchFunctionMode):
    """Who reads each tensor: modules that are looked at, or a call outside of them (None).

    Args:
        modules: those that are looked at.
        norms: of which only the call that has their weight is looked at, as what writes a tensor.
    """

    def __init__(self, modules: set[nn.Module], norms: Iterable[Any]) -> None:
        super().__init__()
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.read: dict[int, list[nn.Module | None]] = {}
        self._kept: list[Any] = []  # so that no other tensor gets the same id
        self._inside = 0
        self._modules = modules
        self._norms = {id(norm.weight): norm for norm in norms if norm.weight is not None}

    def __enter__(self) -> _Readers:
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
