"""The cuts themselves: putting units in, taking them out, refusing models unfit for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from transfer_surgery.plan import Plan
from transfer_surgery.rewrite import Recipe, original_class, rewritten_class
from transfer_surgery.unit import GatedActivation

__all__ = ["insert_units", "refuse_unfit", "restore_owner", "share_hooks", "swap_children"]

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def refuse_unfit(model: nn.Module) -> None:
    """Raise before anything is changed where surgery would do harm.

    Raises:
        TypeError: not an eager module: scripted, compiled, traced or wrapped for distribution.
        ValueError: already converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, not {type(model).__name__}.")
    wrappers = (
        (torch.jit.ScriptModule, "convert the model before torch.jit.script or trace"),
        (torch._dynamo.OptimizedModule, "convert the model before torch.compile"),
        (nn.parallel.DistributedDataParallel, "convert the model before wrapping it in DDP"),
        (nn.DataParallel, "convert the model before wrapping it in DataParallel"),
    )
    for path, module in model.named_modules():
        for wrapper, fix in wrappers:
            if isinstance(module, wrapper):
                raise TypeError(f"{path or 'the model'} is a {type(module).__name__}: {fix}.")
        if isinstance(module, GatedActivation):
            raise ValueError(
                f"{path} is gated already: the model was converted before. Call revert(model) "
                "first, or convert once with all sites."
            )


def insert_units(
    model: nn.Module,
    plan: Plan,
    units: Mapping[str, GatedActivation],
    recipes: Mapping[str, Recipe],
) -> None:
    """Put units in their places and give rewritten owners their class.

    All that can fail comes first; then only names and classes are assigned.

    Args:
        model: the model.
        plan: all of its sites.
        units: the units to put in, by site path.
        recipes: the generated code, by owner path.
    """
    owners = {path: model.get_submodule(path) for path in recipes}
    classes = {path: rewritten_class(type(owners[path]), r) for path, r in recipes.items()}
    default = next(model.parameters(), torch.zeros(())).device
    callers = Counter(site.module for site in plan)
    places = []
    for site in plan:
        if site.path not in units:
            continue
        holder_path, _, name = site.path.rpartition(".")
        holder, unit = model.get_submodule(holder_path), units[site.path]
        unit.to(_device(model.get_submodule(site.owner), default)).train(holder.training)
        original = holder._modules[name] if site.way == "child" else None
        if original is not None:
            unit.replaced = (original,)
            unit.train(original.training)
            share_hooks(original, unit)
        # A module with one caller is that site under each of its names.
        places.append((holder, name, unit, original if callers[site.module] == 1 else None))
    for holder, name, unit, _ in places:
        holder._modules[name] = unit
    swap_children(model, {old: unit for _, _, unit, old in places if old is not None})
    for path, owner in owners.items():
        owner.__class__ = classes[path]


def swap_children(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Register each new module wherever the old one is registered, in the same position."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in swaps:
                module._modules[name] = swaps[child]


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` run the hooks of ``old``; the same tables, so that handles still remove them."""
    for name in _HOOKS:
        object.__setattr__(new, name, getattr(old, name))


def restore_owner(owner: nn.Module) -> None:
    """Give a rewritten owner its class back and drop its units; other modules are left alone."""
    base = original_class(owner)
    if base is not None:
        recipe = vars(type(owner))["_transfer_surgery_recipe"]
        for entry in recipe.table:
            del owner._modules[entry.unit]
        owner.__class__ = base


def _device(owner: nn.Module, default: torch.device) -> torch.device:
    return next(owner.parameters(), torch.empty(0, device=default)).device
