"""save_gates and load_gates: what units hold, in one file; nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._sharding import shard_like
from transfer_surgery.files.safetensors_file import read, write
from transfer_surgery.files.unit_config import (
    Config,
    build_unit,
    check_sites,
    configs_at,
    configs_of,
    plain_path,
    sites_and_tensors,
    unwrap,
)
from transfer_surgery.sites import Plan, find_activations, prepare_recipes
from transfer_surgery.surgery import check_model, insert_units
from transfer_surgery.units import GatedActivation, check_gates_not_flattened

# Limit for gates without log_alpha, whose number no tensor in the file confirms.
_MOST_GATES = 2**28


def save_gates(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Save what a model has from `convert`, matching and training: sites, settings, gates, targets.

    The values have the names that they have in ``model.state_dict()``. The weights of the model are
    not saved; `save_model` saves both.

    A process that is killed here leaves the file as it was, or the new one. In a distributed run
    rank 0 writes. Where FSDP2 shards gates every rank has to call this, which gathers them; wait
    for all ranks before another one reads the file.

    Args:
        model: a converted model, also inside DistributedDataParallel or ``torch.compile``.
        file: the file, usually ``.safetensors``; folders on the way to it are made.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model is not converted, an activation cannot be written as text, a gate is
            NaN, FSDP 1 or ZeRO-3 has flattened the gates, or the file exists and holds something
            else. The file is then as it was.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert
        >>> def base():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = convert(base(), "snake(a=0.5)", example_input=torch.zeros(1, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_gates(model, f"{folder}/gates.safetensors")
        ...     loaded = load_gates(base(), f"{folder}/gates.safetensors", torch.zeros(1, 4))
        >>> loaded[1]
        GatedActivation(
          relu -> snake(a=0.5), channel
          (gate): HardConcreteGate(hard_concrete, shape=(8,))
        )
    """
    check_arguments(save_gates, locals())
    model = unwrap(model)
    sites = configs_of(model)
    check_gates_not_flattened(units_of(model))
    tensors = {
        state_key(path, name): value
        for path, unit in units_of(model).items()
        for name, value in unit.state_dict().items()
    }
    write(Path(file), "gates", {"model": type(model).__name__, "sites": sites}, tensors)


def load_gates(
    model: nn.Module, file: str | os.PathLike[str], example_input: Any = None
) -> nn.Module:
    """Load gates that `save_gates` saved, all or nothing, into a base or a converted model.

    A base model is converted first: exactly the sites of the file, with their settings. Of a
    converted model, which must have these sites and settings, values change in place: parameters
    stay the same objects, also those that FSDP2 shards, and a wrapped optimizer trains them on.

    The weights are not touched: load them before (or after, with ``strict=False``).

    Args:
        model: a model with the code that was converted, with any weights, dtype and device.
        file: a file of `save_gates`, or one of `save_model`, of which the gates are read.
        example_input: as for `convert`; only used to convert a base model.

    Returns:
        The same model object.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no file.
        ValueError: the sites differ (the message names them), an activation or gate is not
            registered, or the file is damaged, newer than this version or of another program. The
            model is then unchanged.
        TypeError: a base model that is compiled or wrapped for distributed training.
    """
    check_arguments(load_gates, locals())
    file = Path(file)
    sites, gates, _ = sites_and_tensors(file, *read(file, "gates", "model"))
    inner = unwrap(model)
    units = units_of(inner)
    if not units:
        return insert_gates(model, file, sites, gates, example_input)
    check_sites(file, inner, sites, configs_of(inner))
    fill_units(file, units, gates)
    for path, unit in units.items():
        if unit.fitted is not None:
            unit.fitted.offset = bool(sites[path]["offset"])
        unit.neurons = int(sites[path]["neurons"])  # which `swap_targets` has counted, maybe
    return model


def read_gates(file: str | os.PathLike[str]) -> dict[str, GatedActivation]:
    """The units of a file of `save_gates` or `save_model`, by path, without their model.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, foreign or too new, or an activation or gate is not registered.
    """
    file = Path(file)
    sites, gates, _ = sites_and_tensors(file, *read(file, "gates", "model"))
    # A site may claim any number of gates: on the meta device that takes no memory.
    with torch.device("meta"):
        units = {path: build_unit(file, path, config) for path, config in sites.items()}
    for path, unit in units.items():
        if not unit.gate.learned and unit.gate.count > _MOST_GATES:
            raise ValueError(f"{file}: the site {path!r} claims {unit.gate.count} gates.")
    _check_values(file, units, gates)
    units = {path: build_unit(file, path, config) for path, config in sites.items()}
    fill_units(file, units, gates)
    return units


def insert_gates(
    model: nn.Module,
    file: Path,
    sites: Mapping[str, Config],
    gates: Mapping[str, Tensor],
    example_input: Any,
) -> nn.Module:
    """Convert exactly the sites of a file, with these values; see `load_gates`."""
    plan = plan_for(model, file, sites, example_input)
    units = {path: build_unit(file, path, config, plan[path]) for path, config in sites.items()}
    fill_units(file, units, gates)
    insert_modules(model, plan, units)
    return model


def plan_for(model: nn.Module, file: Path, sites: Mapping[str, Config], example_input: Any) -> Plan:
    """The plan of a base model that has the sites of a file.

    The sites of the file come first, in its order: an optimizer's state goes by the order of the
    parameters.
    """
    check_model(model)
    plan = _with_listed_names(model, find_activations(model, example_input))
    check_sites(file, model, sites, configs_at(plan, sites))
    order = {path: place for place, path in enumerate(sites)}
    ordered = sorted(plan, key=lambda site: order.get(site.path, len(order)))
    return replace(plan, rows=tuple(ordered))


def insert_modules(model: nn.Module, plan: Plan, units: Mapping[str, Any]) -> None:
    """Put modules at sites of a plan, whose calls are redirected to them."""
    recipes = prepare_recipes(model, plan, set(units))
    insert_units(model, plan, units, recipes)


def units_of(model: nn.Module) -> dict[str, GatedActivation]:
    """Units by the paths that they have where no part of the model is wrapped; none, if so."""
    return {
        plain_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, GatedActivation)
    }


def fill_units(
    file: Path, units: Mapping[str, GatedActivation], tensors: Mapping[str, Tensor]
) -> None:
    """Load values into units, once all of them have been checked.

    Raises:
        ValueError: names, shapes or dtypes are not those of the units' state, or a value is NaN.
    """
    _check_values(file, units, tensors)
    states = {path: unit.state_dict() for path, unit in units.items()}
    if any(value.is_meta for state in states.values() for value in state.values()):
        raise ValueError("the gates are on the meta device: materialise the model first.")
    for path, state in states.items():
        values = {
            key: shard_like(tensors[state_key(path, key)].to(value.device), value)
            for key, value in state.items()
        }
        units[path].load_state_dict(values)


def state_key(path: str, name: str) -> str:
    """The name in ``model.state_dict()`` of what the module at a path calls so."""
    return f"{path}.{name}".lstrip(".")


def _check_values(
    file: Path, units: Mapping[str, GatedActivation], tensors: Mapping[str, Tensor]
) -> None:
    state = {state_key(p, k): v for p, unit in units.items() for k, v in unit.state_dict().items()}
    for key in dict.fromkeys([*state, *tensors]):
        wanted, found = _describe(state.get(key)), _describe(tensors.get(key))
        if wanted != found:
            raise ValueError(f"{file}: {key} is {found}; the gates of this model need {wanted}.")
        if tensors[key].isnan().any():
            raise ValueError(f"{file}: {key} has values that are not a number.")


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _with_listed_names(model: nn.Module, plan: Plan) -> Plan:
    """Paths as `named_modules` has them: the first of the names of a module with one caller."""
    names = {module: path for path, module in model.named_modules()}
    modules = [None if site.module is None else model.get_submodule(site.module) for site in plan]
    sites = [
        replace(site, path=names[module])
        if module is not None and site.way == "child" and modules.count(module) == 1
        else site
        for site, module in zip(plan, modules, strict=True)
    ]
    return replace(plan, rows=tuple(sites))
