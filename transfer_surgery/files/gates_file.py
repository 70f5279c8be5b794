"""save_gates and load_gates: what units hold, as JSON and safetensors; nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._sharding import gathered, shard_like
from transfer_surgery.activations import get_activation
from transfer_surgery.files.gate_config import GateConfig
from transfer_surgery.files.safetensors_file import (
    GATES,
    read_files,
    require_safetensors,
    write_files,
)
from transfer_surgery.files.site_config import SiteConfig
from transfer_surgery.sites import Plan, Site, find_activations, prepare_rewrites, undisturbed
from transfer_surgery.surgery import check_model, insert_units
from transfer_surgery.units import (
    GatedActivation,
    gate_settings,
    gated_activations,
    granularity_of,
    make_gate,
)

# Attributes under which wrappers hold the model they wrap. By name, as in `unfit`.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}


def save_gates(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save what a model has from `convert`, matching and training: sites, settings, gates, targets.

    ``config.json`` describes the sites, ``gates.safetensors`` holds the values under their names in
    ``model.state_dict()``. The weights of the model are not in it.

    A process that is killed here leaves what the folder held before, or the new gates. (If the
    folder held gates of *other* sites it may leave both in part; `load_gates` then refuses it.)

    In a distributed run rank 0 writes. Where FSDP2 shards gates every rank has to call this: it
    gathers them. Synchronise before another rank reads the folder.

    Args:
        model: a converted model, also inside DistributedDataParallel or ``torch.compile``.
        folder: a folder of its own; it is made where there is none.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model is not converted, an activation cannot be written as text, or the
            folder holds the ``config.json`` of another program.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert
        >>> def base():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = convert(base(), "snake(a=0.5)", example_input=torch.zeros(1, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_gates(model, folder)
        ...     load_gates(base(), folder, example_input=torch.zeros(1, 4))[1]
        GatedActivation(
          relu -> snake(a=0.5), channel
          (gate): HardConcreteGate(hard_concrete, shape=(8,))
        )
    """
    require_safetensors()
    model = _unwrap(model)
    config = describe(model)
    tensors = {}
    for path, unit in _units(model).items():
        for name, value in unit.state_dict().items():
            own = gathered(value).detach().to("cpu", copy=True)
            tensors[state_key(path, name)] = own.contiguous()
        location = tensors.get(state_key(path, "gate.log_alpha"))
        if location is not None and location.shape != unit.gate.shape:
            raise ValueError(
                f"{path}: log_alpha has the shape {tuple(location.shape)} instead of "
                f"{unit.gate.shape}; of the ways to shard a model, save_gates knows fully_shard."
            )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    write_files(Path(folder), config, tensors)


def load_gates(
    model: nn.Module, folder: str | os.PathLike[str], example_input: Any = None
) -> nn.Module:
    """Load gates that `save_gates` saved, all or nothing, into a base or a converted model.

    A base model is converted first: exactly the sites of the checkpoint, with their settings. Of a
    converted model, which must have these sites and settings, values change in place: parameters
    stay the same objects, also those that FSDP2 shards, and a wrapped optimizer goes on with them.

    The weights are not touched: load them before (or after, with ``strict=False``).

    Args:
        model: a model with the code that was converted, with any weights, dtype and device.
        folder: the folder given to `save_gates`.
        example_input: as for `convert`; only used to convert a base model.

    Returns:
        The same model object.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no folder, or no such checkpoint in it.
        ValueError: the sites differ (the message names them); an activation or gate is not
            registered; a file is damaged, newer than this version or not of `save_gates`. The
            model is then unchanged.
        TypeError: a base model that is compiled or wrapped for distributed training.
    """
    config, tensors = read_files(Path(folder))
    config.refuse_unknown()
    inner = _unwrap(model)
    units = _units(inner)
    if units:
        config.refuse_other_sites(type(inner).__name__, _describe(inner))
        fill_units(units, tensors)
        return model
    return insert_gates(model, config, tensors, example_input)


def insert_gates(
    model: nn.Module, config: GateConfig, tensors: Mapping[str, Tensor], example_input: Any
) -> nn.Module:
    """Convert exactly the sites of a config, with these values; see `load_gates`."""
    check_model(model)
    plan = _with_listed_names(model, find_activations(model, example_input))
    config.refuse_other_sites(type(model).__name__, config.at(plan))
    units = {site.path: build_unit(site, plan[site.path]) for site in config.sites}
    fill_units(units, tensors)
    with undisturbed():
        recipes = prepare_rewrites(model, plan, set(units))
    # An optimizer's state goes by the order of the parameters: the saved one.
    order = {path: place for place, path in enumerate(units)}
    sites = sorted(plan, key=lambda site: order.get(site.path, len(order)))
    insert_units(model, replace(plan, sites=tuple(sites)), units, recipes)
    return model


def _unwrap(model: nn.Module) -> nn.Module:
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def _units(model: nn.Module) -> dict[str, GatedActivation]:
    """Units by the paths that they have where no part of the model is wrapped."""
    return {
        ".".join(name for name in path.split(".") if name not in _WRAPPED): module
        for path, module in model.named_modules()
        if isinstance(module, GatedActivation)
    }


def describe(model: nn.Module) -> GateConfig:
    """The gated sites of a converted model."""
    return GateConfig(type(model).__name__, tuple(_describe(model).values()))


def _describe(model: nn.Module) -> dict[str, SiteConfig]:
    found = dict(gated_activations(model))
    owners = [model.get_submodule(path.rpartition(".")[0]) if path else None for path in found]
    return {
        path: SiteConfig.of(path, unit, owner)
        for (path, unit), owner in zip(_units(model).items(), owners, strict=True)
    }


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
    return replace(plan, sites=tuple(sites))


def build_unit(site: SiteConfig, found: Site | None = None) -> GatedActivation:
    """The unit of a saved site, before its values are loaded; for the place where it was found."""
    # Its values are overwritten; torch's own stream stays.
    gate = make_gate(gate_settings(site.gate), site.shape, torch.Generator())
    unit = GatedActivation(
        get_activation(site.source),
        get_activation(site.target),
        gate,
        granularity=granularity_of(site.granularity, site.channel_axis),
        neurons=site.neurons,
        path=site.path,
        overwrites_input=found is not None and found.overwrites_input,
        inplace=found is not None and found.inplace,
        position=site.position,
        stage=site.stage,
    )
    if site.matched:
        unit.add_fitted_target()
    return unit


def fill_units(units: Mapping[str, GatedActivation], tensors: Mapping[str, Tensor]) -> None:
    """Load values into units, after a look at all of them.

    Raises:
        ValueError: the names, shapes or dtypes are not those of the units' state.
    """
    states = {path: unit.state_dict() for path, unit in units.items()}
    flat = {state_key(path, k): v for path, state in states.items() for k, v in state.items()}
    for key in [*flat, *tensors]:
        wanted, found = _kind(flat.get(key)), _kind(tensors.get(key))
        if wanted != found:
            raise ValueError(f"{GATES}: {key} is {found}; the gates of this model need {wanted}.")
        if flat[key].is_meta:
            raise ValueError(f"{key} is on the meta device; materialise the model first.")
    for path, state in states.items():
        values = {
            k: shard_like(tensors[state_key(path, k)].to(v.device), v) for k, v in state.items()
        }
        units[path].load_state_dict(values)


def state_key(path: str, name: str) -> str:
    """The name in ``model.state_dict()`` of what a unit calls so."""
    return f"{path}.{name}".lstrip(".")


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
