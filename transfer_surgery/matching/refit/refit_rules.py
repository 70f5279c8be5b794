"""Which layers can be refitted, and why the others are left alone.

A weight is changed only where it is a plain trainable parameter that this layer alone reads.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from transfer_surgery._running import hooked
from transfer_surgery.matching.ranks import number_of_ranks
from transfer_surgery.matching.refit.layer_refit import LayerFit
from transfer_surgery.matching.refit.linear_maps import LAYERS
from transfer_surgery.surgery import sharing_parameters, why_not_plain
from transfer_surgery.units import GatedActivation

_TOLERANCE = 1e-4  # of the largest output


def layers_to_refit(model: nn.Module) -> tuple[list[nn.Module], dict[nn.Module, str]]:
    """The linear layers that can be refitted; and the others, each with the reason."""
    shared = sharing_parameters(model)
    elsewhere = _in_other_networks(model)
    layers: list[nn.Module] = []
    left: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, LAYERS):
            reason = _why_not(module)
            if reason is None and module in shared:
                reason = "shares a parameter"
            if reason is None and module in elsewhere:
                reason = "is part of another network, too"
            if reason is None:
                layers.append(module)
            else:
                left[module] = reason
    return layers, left


def _why_not(module: nn.Module) -> str | None:
    """What about a layer itself forbids to change its weights, in a few words."""
    if reason := why_not_plain(module):
        return reason
    if number_of_ranks() > 1 and LayerFit(module).is_wide:
        return "has too many inputs to be refitted by several ranks together"
    return None


@contextmanager
def subclasses_judged(layers: Iterable[nn.Module], left: dict[nn.Module, str]) -> Iterator[None]:
    """While the model runs in this, layers of subclasses are compared with torch's own class.

    Args:
        layers: those that can be refitted.
        left: gets the layers among them that compute something else, with the reason.
    """

    def judge(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not _computes_as_torch(layer, args, kwargs):
            name = f"{type(layer).__module__}.{type(layer).__qualname__}"
            left[layer] = f"is of the class {name}, which computes something else"

    others = [layer for layer in layers if type(layer) not in LAYERS]
    with hooked(*(layer.register_forward_hook(judge, with_kwargs=True) for layer in others)):
        yield


def _computes_as_torch(layer: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call gives what torch's class gives, with other weights, too.

    timm's linear layer does; a convolution that standardises or caches its weights does not.
    """
    own: Any = next(kind for kind in type(layer).__mro__ if kind in LAYERS)
    before = [(p, p.data) for p in layer.parameters(recurse=False)]
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        try:
            for p, values in before:
                p.data = -2 * values
            found, wanted = layer.forward(*args, **kwargs), own.forward(layer, *args, **kwargs)
            return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
        except Exception:  # it takes or gives something else
            return False
        finally:
            for p, values in before:
                p.data = values


def _in_other_networks(model: nn.Module) -> set[nn.Module]:
    """The layers that a network which is no part of this one has, too: a teacher, say.

    A module that contains the whole model is no other network.
    """
    if not _is_held_elsewhere(model):
        return set()
    own = set(model.modules())
    shared = _shared_by_others(model, own)
    if shared:
        gc.collect()  # what nobody holds any more is no network; this takes a while
        shared = _shared_by_others(model, own)
    return shared


def _shared_by_others(model: nn.Module, own: set[nn.Module]) -> set[nn.Module]:
    """The same, with networks that nobody holds any more."""
    parameters = {id(p): module for module in own for p in module._parameters.values()}
    shared: set[nn.Module] = set()
    # While this list exists, a thread that makes a tuple of an iterator fails with a SystemError.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, nn.Module)}
    for found in objects:
        if type(found) not in kinds or found in own:
            continue
        for parameter in vars(found).get("_parameters", {}).values():
            if parameter is not None and id(parameter) in parameters:
                shared.add(parameters[id(parameter)])
        for child in vars(found).get("_modules", {}).values():
            if child in own and child is not model:
                shared.update(child.modules())
    return shared


def _is_held_elsewhere(model: nn.Module) -> bool:
    """Whether something may hold a layer, a parameter or a part of a model beside the model itself.

    Then all objects are looked through, which takes long and disturbs other threads.
    """
    modules = list(model.modules())
    parts = [
        part
        for module in modules
        for part in (*module._parameters.values(), *module._modules.values())
        if isinstance(part, (nn.Parameter, *LAYERS)) or getattr(part, "_modules", None)
    ]
    places = Counter(map(id, parts))
    listed = Counter(map(id, modules))
    # Each is held by its places and by both lists; some Pythons count the loop and the call.
    (usual,) = (sys.getrefcount(one) - 1 for one in [object()])
    return any(
        sys.getrefcount(part) > 2 * places[id(part)] + listed[id(part)] + usual
        for part in parts
        if not isinstance(part, GatedActivation)
    )
