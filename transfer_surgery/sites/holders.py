"""The places in which a model holds its modules, as far as modules there can be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from transfer_surgery.sites.plain import is_plain
from transfer_surgery.units import GatedActivation

_MODULE_STATE = frozenset(vars(nn.Module()))


def swap_children(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module wherever the old one is: registered, or in an attribute of a module."""
    seen: set[int] = set()
    for old in swaps:
        if isinstance(old, GatedActivation):
            old.is_out = True
    for module in list(model.modules()):
        if isinstance(module, GatedActivation):
            continue  # it keeps the module that it stands in for
        for name, child in module._modules.items():
            if child is not None and child in swaps:
                module._modules[name] = swaps[child]
        for name in vars(module).keys() - _MODULE_STATE:
            vars(module)[name] = _swap_inside(vars(module)[name], swaps, seen)


def _swap_inside(value: Any, swaps: Mapping[nn.Module, nn.Module], seen: set[int]) -> Any:
    """Swap modules in plain lists, tuples and dicts; lists and dicts stay the same objects."""
    if isinstance(value, nn.Module):
        return swaps.get(value, value)
    if type(value) not in (list, tuple, dict) or id(value) in seen:
        return value
    seen.add(id(value))  # containers may contain themselves
    if isinstance(value, list):
        value[:] = [_swap_inside(item, swaps, seen) for item in value]
    elif isinstance(value, dict):
        value.update({key: _swap_inside(item, swaps, seen) for key, item in value.items()})
    else:
        items = tuple(_swap_inside(item, swaps, seen) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def swap_for_twins(probe: nn.Module) -> dict[nn.Module, nn.Module]:
    """Replace all modules of a stand-in that may be activations, as `convert` would, by twins.

    An original that runs all the same was reached another way: through a named tuple, a closure or
    an object that nobody can look into. A unit in its place would not run.

    Returns:
        The twins, by their originals; both have the same tables of hooks.
    """
    twins: dict[nn.Module, nn.Module] = {}
    for module in probe.modules():
        if module is probe or isinstance(module, torch.jit.ScriptModule):
            continue
        if not (module._modules or module._parameters or module._buffers) and is_plain(module):
            twin = twins[module] = object.__new__(type(module))
            for name, value in vars(module).items():
                is_own = isinstance(value, MethodType) and value.__self__ is module
                vars(twin)[name] = MethodType(value.__func__, twin) if is_own else value
    swap_children(probe, twins)
    return twins
