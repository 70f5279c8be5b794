"""Whose code makes a running activation call, and why it can have no gates there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from transfer_surgery.sites.call_location import Location, locate
from transfer_surgery.sites.frames import code_of, is_torch
from transfer_surgery.sites.observation import Frame

OUTSIDE = "it runs outside of forward, in a hook or in __call__; call it in forward"
UNREGISTERED = (
    "the module that calls it is not registered in the model; keep it in an nn.ModuleList or "
    "nn.ModuleDict"
)
IN_THREAD = "a thread that forward starts begins with it; let the thread call a module around it"


class Place(NamedTuple):
    """The place of a running activation call.

    Attributes:
        caller: the module whose code it is.
        location: where in that code.
        called: the activation module that the code calls, if it is an attribute of the caller's
            class, and the names that lead to it.
        reason: why the call has no gates, whatever it computes; None where it may.
    """

    caller: nn.Module
    location: Location
    called: tuple[nn.Module, tuple[str, ...]] | None = None
    reason: str | None = None


def place_of(frame: Frame, paths: Mapping[int, str]) -> Place:
    """The place of the running call.

    Args:
        frame: the innermost module of the model whose forward runs.
        paths: the paths of the model's modules, by their identity.
    """
    module = frame.module
    (location, caller), *outer = locate() or [((), module)]
    if frame.is_around or (caller is not module and id(caller) in paths):
        return Place(caller if id(caller) in paths else module, location, None, OUTSIDE)
    if caller is module:
        is_replaced = "forward" in vars(module)
        reason = "its caller's forward is replaced on the instance" if is_replaced else None
        return Place(module, location, None, reason)
    name = _name_in_class(module, caller)
    if name is not None and outer[0][1] is module:
        return Place(module, outer[0][0], (caller, (name,)))
    return Place(module, location, None, UNREGISTERED)


def _name_in_class(holder: nn.Module, module: nn.Module) -> str | None:
    """The name under which a class has an activation module of torch, without hooks on it."""
    state = (module._parameters, module._forward_hooks, module._forward_pre_hooks)
    code = code_of(type(module).forward)
    if any(state) or any(True for _ in module.children()) or code is None or not is_torch(code):
        return None
    held = (item for cls in type(holder).__mro__ for item in vars(cls).items())
    return next((name for name, value in held if value is module), None)
