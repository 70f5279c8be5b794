"""Which layer writes the input of a site, and which one reads its output, alone: from one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transfer_surgery._dataflow import Readers
from transfer_surgery.surgery.plain_weights import has_hooks, sharing_parameters, why_not_plain
from transfer_surgery.units import FittedActivation

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
    x, y = calls[0]
    found: list[tuple[Any, str]] = []
    layer: Any
    for tensor, layer in ((x, readers.writer(x)), (y, readers.only_reader(y))):
        behind = tensor is y
        if len(readers.read.get(id(tensor), [])) > 1:
            found.append((None, "(several readers)"))
        elif layer not in layers or (behind and isinstance(layer, _NORMS)):
            found.append((None, "(no layer there)"))
        elif reason := _why_not_layer(site, tensor, layer, readers, shared):
            found.append((None, f"({layers[layer]} {reason})"))
        else:
            found.append((layer, layers[layer]))
    return Neighbours(*found[0], *found[1])


def _why_not_site(
    site: FittedActivation, calls: int, readers: Readers, shared: set[nn.Module]
) -> str | None:
    """Why the numbers of a site must stay there; None: they may move."""
    if calls != 1:
        return f"(called {calls} times)"
    if has_hooks(site) or has_hooks(site.activation):
        return "(the site has hooks)"
    if site in shared or site in readers.read_elsewhere:
        return "(its numbers are shared)"
    return None


def _why_not_layer(
    site: FittedActivation, x: Tensor, layer: Any, readers: Readers, shared: set[nn.Module]
) -> str | None:
    """Why a layer that writes or reads ``x`` cannot take numbers of a site; None: it can."""
    if reason := why_not_plain(layer):
        return reason
    if len(readers.calls[layer]) > 1 or layer in shared:
        return "is shared"
    if layer in readers.read_elsewhere:
        return "has parameters that are read elsewhere"
    return None if _along_channels(site, x, layer) else "has another axis"


def _along_channels(site: FittedActivation, x: Tensor, layer: Any) -> bool:
    """Whether there is one number for all of `x`, or one per channel of the layer."""
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return False
    axis = x.dim() - 1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
    if isinstance(layer, CONVOLUTIONS) and x.dim() < layer.weight.dim():
        return False  # without an axis of examples
    return site.granularity.axes(x.dim()) in ((), (axis,))
