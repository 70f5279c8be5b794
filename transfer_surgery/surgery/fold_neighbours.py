"""Which layer writes the input of a site, and which one reads its output, alone: from one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transfer_surgery._dataflow import Readers
from transfer_surgery.surgery.plain_weights import has_hooks, sharing_parameters, why_not_plain
from transfer_surgery.units import FittedActivation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NONE = "(no layer there)"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


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
    # Only torch's own classes: a subclass may compute anything, apart from its norm.
    known = (nn.Linear, *CONVOLUTIONS, *_NORMS)
    layers = {m: path for path, m in model.named_modules() if type(m) in known}
    norms = {m: path for path, m in model.named_modules() if isinstance(m, _NORMS)}
    with Readers({*layers, *sites.values()}, [m for m in norms if m not in layers]) as readers:
        readers.note_output(run())
    shared = sharing_parameters(model)
    layers |= norms
    return {path: _around(site, layers, readers, shared) for path, site in sites.items()}


def _around(
    site: FittedActivation,
    layers: Mapping[nn.Module, str],
    readers: Readers,
    shared: set[nn.Module],
) -> Neighbours:
    calls = readers.calls.get(site, [])
    if reason := _why_not_site(site, len(calls), readers, shared):
        return Neighbours(None, reason, None, reason)
    given, returned = zip(*calls, strict=True)
    writers = [readers.writer(x) for x in given]
    read_by = [readers.only_reader(y) for y in returned]
    read_by = [None if isinstance(reader, _NORMS) else reader for reader in read_by]
    before = _common(site, given, writers, layers, readers, shared)
    return Neighbours(*before, *_common(site, returned, read_by, layers, readers, shared))


def _common(
    site: FittedActivation,
    tensors: Sequence[Tensor],
    found: Sequence[nn.Module | None],
    layers: Mapping[nn.Module, str],
    readers: Readers,
    shared: set[nn.Module],
) -> tuple[Any, str]:
    """The layer that is found at every call of a site, with its name; else None and the reason.

    Args:
        site: it.
        tensors: what goes in, or what comes out, at each call.
        found: what writes, or alone reads, each of these.
        layers: all layers, with their names.
        readers: who reads what.
        shared: modules that share parameters.
    """
    layer: Any = found[0]
    if any(len(readers.read.get(id(tensor), [])) > 1 for tensor in tensors):
        return None, "(several readers)"
    if layer not in layers:
        return None, _NONE
    if any(other is not layer for other in found):
        return None, "(several layers)"
    if reason := _why_not_layer(site, tensors, layer, readers, shared):
        return None, f"({layers[layer]} {reason})"
    return layer, layers[layer]


def _why_not_site(
    site: FittedActivation, calls: int, readers: Readers, shared: set[nn.Module]
) -> str | None:
    """Why the numbers of a site must stay there; None: they may move."""
    if not calls:
        return "(not called)"
    if has_hooks(site) or has_hooks(site.activation):
        return "(the site has hooks)"
    if site in shared or site in readers.read_elsewhere:
        return "(its numbers are shared)"
    return None


def _why_not_layer(
    site: FittedActivation,
    tensors: Sequence[Tensor],
    layer: Any,
    readers: Readers,
    shared: set[nn.Module],
) -> str | None:
    """Why a layer that writes or reads tensors cannot take numbers of a site; None: it can."""
    if reason := why_not_plain(layer):
        return reason
    if len(readers.calls[layer]) > len(tensors) or layer in shared:
        return "is shared"
    if layer in readers.read_elsewhere:
        return "has parameters that are read elsewhere"
    fits = all(_along_channels(site, tensor, layer) for tensor in tensors)
    return None if fits else "has another axis"


def _along_channels(site: FittedActivation, x: Tensor, layer: Any) -> bool:
    """Whether there is one number for all of `x`, or one per channel of the layer."""
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return False
    axis = x.dim() - 1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
    if isinstance(layer, CONVOLUTIONS) and x.dim() < layer.weight.dim():
        return False  # without an axis of examples
    return site.granularity.axes(x.dim()) in ((), (axis,))
