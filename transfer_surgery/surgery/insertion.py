"""The cuts themselves: putting units in and taking them out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from transfer_surgery.sites import (
    GraphRoute,
    Plan,
    Recipe,
    edit_graph,
    extend_class,
    names_read,
    restore_graph,
    rewritten_class,
    swap_children,
)
from transfer_surgery.surgery.encoder_fast_path import close_fused_paths
from transfer_surgery.units import GatedActivation, ModuleSettings

_MODULE_STATE = frozenset(vars(nn.Module()))
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def insert_units(
    model: nn.Module,
    plan: Plan,
    units: Mapping[str, nn.Module],
    recipes: Mapping[str, Recipe],
) -> None:
    """Put units in their places and give callers their class.

    All that can fail comes first; then only names and classes are assigned, past any
    ``__setattr__`` of the modules.

    Args:
        model: the model.
        plan: all of its sites.
        units: the units, or the plain modules of a baked network, by site path.
        recipes: what makes the classes of callers, by their paths.
    """
    # Make and find all that is needed.
    callers = {path: model.get_submodule(path) for path in recipes}
    classes = {path: _rewritten_type(callers[path], recipe) for path, recipe in recipes.items()}
    default = next(model.parameters(), torch.zeros(())).device
    calls = _count_callers(model, plan)
    places = []
    for site in plan:
        if site.path not in units:
            continue
        holder_path, _, name = site.path.rpartition(".")
        holder, unit = model.get_submodule(holder_path), units[site.path]
        unit.to(_device(model.get_submodule(site.caller), default)).train(holder.training)
        original = holder._modules[name] if site.way == "child" else None
        if original is not None:
            if isinstance(unit, GatedActivation):
                unit.replaced = (original,)
            unit.train(original.training)
            share_hooks(original, unit, shared=calls[original] > 1)
            answer_for(original, unit)
            if isinstance(unit, GatedActivation):
                unit.settings = ModuleSettings(original, names_read(original), unit)
        elif site.module is not None and site.way != "intercept":  # it is not called any more
            module = model.get_submodule(site.module)
            share_hooks(module, unit, shared=True)
            if isinstance(unit, GatedActivation):
                unit.settings = ModuleSettings(module, names_read(module), None)
        places.append((holder, name, unit, original))
    # Assign. A module with one caller is that site under each of its names.
    everywhere = {old: unit for _, _, unit, old in places if old is not None and calls[old] == 1}
    for holder, name, unit, _ in places:
        holder._modules[name] = unit
    swap_children(model, everywhere)
    close_fused_paths(model, [model.get_submodule(s.caller) for s in plan if s.path in units])
    for path, caller in callers.items():
        object.__setattr__(caller, "__class__", classes[path])
    graphs: dict[str, list[tuple[GraphRoute, str]]] = {}
    for site in plan:
        if site.path in units and isinstance(site.route, GraphRoute):
            name = site.path.rpartition(".")[2]
            graphs.setdefault(site.caller, []).append((site.route, name))
    for path, routes in graphs.items():
        edit_graph(cast(fx.GraphModule, model.get_submodule(path)), routes)


def _count_callers(model: nn.Module, plan: Plan) -> Counter[nn.Module]:
    """At how many places each activation module is called, also where a filtered plan is silent."""
    sites = Counter(model.get_submodule(s.module) for s in plan if s.module is not None)
    seen: Counter[nn.Module] = Counter()
    for code in plan.calls.values():
        seen.update({model.get_submodule(path) for path in code.modules})
    return sites | seen


def share_hooks(old: nn.Module, new: nn.Module, shared: bool = False) -> None:
    """Let ``new`` run the hooks of ``old``.

    Args:
        old: the module that was there.
        new: the module that takes its place.
        shared: whether ``old`` had other places too. Each then gets tables of hooks of its own;
            otherwise they are the same tables, so that the handles of hooks still remove them.
    """
    for name in _HOOKS:
        value = getattr(old, name)
        object.__setattr__(new, name, copy.copy(value) if shared else value)


def answer_for(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what the module whose place it takes can be asked for, such as its slope.

    Methods remain those of the old module; of properties it is the value at this time, if any.
    """
    public = {name for name in dir(type(old)) if not name.startswith("_")}
    for name in sorted((vars(old).keys() | public) - _MODULE_STATE):
        if hasattr(new, name):
            continue
        try:
            vars(new)[name] = getattr(old, name)
        except Exception:  # a property of the user's, which may raise anything
            continue


def restore_caller(caller: nn.Module) -> None:
    """Give a caller its class or graph back and drop its units."""
    restore_graph(caller)
    for cls in type(caller).__mro__:
        recipe = vars(cls).get("_transfer_surgery_recipe")
        if recipe is not None:
            for entry in recipe.table:
                if (unit := caller._modules.pop(entry.unit, None)) is not None:
                    unit.is_out = True  # type: ignore[assignment]
            restored = _with_ancestor(type(caller), cls, cls.__bases__[0])
            object.__setattr__(caller, "__class__", restored)


def _rewritten_type(caller: nn.Module, recipe: Recipe) -> type[nn.Module]:
    """The class of a caller: `parametrize` expects its own class to stay on top."""
    base = type_before_parametrizations(caller)
    return _with_ancestor(type(caller), base, rewritten_class(base, recipe))


def _with_ancestor(cls: type[Any], old: type[Any], new: type[Any]) -> type[Any]:
    """A class like ``cls``, made at run time over ``old``, over ``new`` instead."""
    if cls is old:
        return new
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    made = extend_class(_with_ancestor(cls.__bases__[0], old, new), members)
    made.__name__ = cls.__name__
    return made


def _device(caller: nn.Module, default: torch.device) -> torch.device:
    return next(caller.parameters(), torch.empty(0, device=default)).device
