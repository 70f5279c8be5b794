"""How each site is redirected, and where in the model its unit will live."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from transfer_surgery.activations import get_activation
from transfer_surgery.sites.asked_classes import asked_classes, asked_names
from transfer_surgery.sites.frames import code_of, names_in
from transfer_surgery.sites.graph import GraphRoute
from transfer_surgery.sites.observation import Observation
from transfer_surgery.sites.place import IN_THREAD, UNREGISTERED
from transfer_surgery.sites.route import Route
from transfer_surgery.sites.site import Site
from transfer_surgery.sites.trace import IN_FUNCTION
from transfer_surgery.units import GatedActivation, PerLayer, make_gate

_WALKED = (
    "code around its caller walks over the caller's children, and would find the unit; walk over "
    "named_modules() there"
)
_WAYS = {Route: "edit", GraphRoute: "fx", type(None): "intercept"}


def assign_ways(
    model: nn.Module,
    merged: dict[tuple[str, Any], dict[str, Any]],
    observations: Sequence[Observation],
) -> None:
    """Decide how each site is redirected and where its unit will live.

    Args:
        model: the model.
        merged: what is known of each site; its way is added.
        observations: what was seen in each training mode.
    """
    walked = set[str]().union(*(one.walked for one in observations))
    walked_from_outside = set[str]().union(*(one.walked_from_outside for one in observations))
    irreplaceable = set[str]().union(*(one.irreplaceable for one in observations))
    callers: dict[str, list[tuple[str, Any]]] = {}
    for (caller, key), f in merged.items():
        if f["module"] is not None:
            callers.setdefault(f["module"], []).append((caller, key))
    asking = asked_classes(model)
    classes = (_class_names(model.get_submodule(path)) for path in callers)
    asked = asked_names(model, set[str]().union(*classes))
    for (caller, key), f in merged.items():
        sites = callers.get(f["module"], [])
        own = [site for site in sites if site[0] == caller]
        if f["module"] is None:
            base = f["source"].name
        else:
            module = model.get_submodule(f["module"])
            names = _registered_names(model, caller, f["module"])
            private = len(own) == len(names) and (len(own) == 1 or _runs_in_order(model, caller))
            alone = len(sites) == 1
            if (
                (alone or private)
                and f["module"] not in irreplaceable
                and asked.isdisjoint(_class_names(module))
                and not _has_other_attributes(module)
            ):
                own_path = _join(caller, names[own.index((caller, key))]) if private else ""
                f["way"], f["path"] = "child", f["module"] if alone else own_path
                f["why"], f["route"] = None, None
                continue
            base = names[0] if names else f["module"].rpartition(".")[2]
        if caller in walked_from_outside:
            f["reason"] = f["reason"] or _WALKED
        if caller in walked and f["route"] is not None:
            f["route"], f["why"] = None, "its code walks over its children"
        f["way"] = _WAYS[type(f["route"])]
        f["path"] = _free_name(model, caller, base, {g.get("path") for g in merged.values()})
        asker = asking.get(type(model.get_submodule(caller)))
        if asker is not None and f["way"] != "fx":
            f["reason"] = f["reason"] or f"{asker} asks for the class, which conversion changes"
        # Copies of graphs keep what is in the graph, and calls of others are not intercepted.
        is_graph = isinstance(model.get_submodule(caller), fx.GraphModule)
        if f["route"] is None and (is_graph or f["why"] in (IN_THREAD, UNREGISTERED, IN_FUNCTION)):
            f["reason"] = f["reason"] or f["why"]


def _registered_names(model: nn.Module, caller: str, module: str) -> list[str]:
    target = model.get_submodule(module)
    return [n for n, child in model.get_submodule(caller)._modules.items() if child is target]


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__ if cls not in nn.Module.__mro__}


def _has_other_attributes(module: nn.Module) -> bool:
    """Whether a module can be asked for something that means another thing in a unit."""
    classes = (cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__)
    return not _names_of_units().isdisjoint(set().union(vars(module), *map(vars, classes)))


@functools.cache
def _names_of_units() -> frozenset[str]:
    """The attributes that units have beside those of any module and of activation modules."""
    relu, gate = get_activation("relu"), make_gate("line", (1,))
    names = dir(GatedActivation(relu, relu, gate, granularity=PerLayer()))
    return frozenset(names) - set(dir(nn.Module())) - {"inplace"}


def _runs_in_order(model: nn.Module, caller: str) -> bool:
    return type(model.get_submodule(caller)).forward is nn.Sequential.forward


def _free_name(model: nn.Module, caller: str, base: str, taken: set[str | None]) -> str:
    module, number = model.get_submodule(caller), 0
    # Not hasattr: a __getattr__ may answer to any name.
    held = set(nn.Module.__dir__(module))  # type: ignore[no-untyped-call]
    while f"{base}_{number}" in held or _join(caller, f"{base}_{number}") in taken:
        number += 1
    return _join(caller, f"{base}_{number}")


def _join(caller: str, name: str) -> str:
    return f"{caller}.{name}" if caller else name


def check_intercepted(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """List calls with the reason whose interception would turn a fused path of torch off."""
    fused: dict[str, str] = {}
    for caller in {site.caller for site in sites if site.way == "intercept" and not site.reason}:
        for module in model.get_submodule(caller).modules():
            code = code_of(inspect.getattr_static(type(module), "forward", None))
            if code is not None and "has_torch_function" in names_in(code):
                fused[caller] = (
                    f"an interception would turn {type(module).__name__}'s fused path off"
                )
    return [
        replace(site, reason=f"{site.why}, and {fused[site.caller]}")
        if site.way == "intercept" and not site.reason and site.caller in fused
        else site
        for site in sites
    ]
