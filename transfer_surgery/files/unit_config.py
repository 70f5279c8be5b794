"""What a file says about each gated site: `GatedActivation.config`, by path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.files.safetensors_file import is_below
from transfer_surgery.sites import Plan, Site
from transfer_surgery.units import (
    GatedActivation,
    gate_settings,
    gated_activations,
    granularity_of,
    make_gate,
)

Config = dict[str, Any]

# Attributes under which wrappers hold the model they wrap, by the names of the wrappers' classes.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}
# These depend on the size of the example, are for reports only, or say how numbers are trained.
_NOT_COMPARED = {"neurons", "position", "stage", "init", "found", "offset"}
_SHOWN = 20


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, `torch.compile` and the like."""
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def plain_path(path: str) -> str:
    """A path, or a key of a state dict, as it is where no part of the model is wrapped."""
    return ".".join(name for name in path.split(".") if name not in _WRAPPED)


def configs_of(model: nn.Module) -> dict[str, Config]:
    """What a file says about the sites of a converted model.

    Raises:
        ValueError: the model is not converted, or an activation cannot be written as text.
    """
    configs = {}
    for path, unit in gated_activations(model):
        for activation in (unit.source, unit.target):
            _check_text(path, activation)
        configs[plain_path(path)] = unit.config()
    return configs


def sites_and_tensors(
    file: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Config], dict[str, Tensor], dict[str, Tensor]]:
    """The sites of a file of gates or of a model, their values, and the weights.

    Args:
        file: the file, for messages.
        about: what it says about its tensors.
        tensors: all of them.

    Raises:
        ValueError: the file does not describe its sites.
    """
    sites = sites_in(file, about)
    if about["kind"] == "gates":
        return sites, dict(tensors), {}
    gates = {key: value for key, value in tensors.items() if is_below(key, sites)}
    return sites, gates, {key: value for key, value in tensors.items() if key not in gates}


def sites_in(file: Path, about: Mapping[str, Any]) -> dict[str, Config]:
    """The configs of the sites in the description of a file.

    Raises:
        ValueError: there are none.
    """
    sites = about.get("sites")
    if isinstance(sites, dict) and sites and all(isinstance(s, dict) for s in sites.values()):
        return sites
    raise ValueError(f"{file} is damaged: it does not describe its sites.")


def configs_at(plan: Plan, saved: Mapping[str, Config]) -> dict[str, Config | str]:
    """The saved sites as a plan of a model has them, or why it cannot have them."""
    found: dict[str, Config | str] = {}
    for site in plan:
        if site.path not in saved:
            continue
        config = saved[site.path]
        try:
            wanted = granularity_of(config["granularity"])
            was_found = config["granularity"].get("found")
            granularity = site.granularity(wanted.name if was_found else wanted)
        except (AttributeError, KeyError, TypeError, ValueError):
            found[site.path] = (
                f"its granularity in the file is {config.get('granularity')!r}, and its input here "
                f"has the shape {site.shape}"
            )
            continue
        if site.reason is not None:
            found[site.path] = f"it cannot be converted here: {site.reason}"
        else:
            call = plan.call_number(site, saved)
            found[site.path] = config | {
                "source": str(site.source),
                "shape": list(granularity.gate_shape(site.shape)),
                "granularity": granularity.to_dict(),
                "call": call and list(call),
            }
    return found


def check_sites(
    file: Path, model: nn.Module, saved: Mapping[str, Config], here: Mapping[str, Config | str]
) -> None:
    """Raise where the sites of a model are not those of a file.

    Args:
        file: the file, for the message.
        model: the model, for the message.
        saved: the sites of the file.
        here: the sites of the model, or why it cannot have them.

    Raises:
        ValueError: the message names the sites that differ, and how.
    """
    different = []
    for path in dict.fromkeys([*saved, *here]):
        found = here.get(path, "there is no such site here")
        if path not in saved:
            different.append(f"{path}: it has gates here and none in the file")
        elif isinstance(found, str):
            different.append(f"{path}: {found}")
        elif why := _difference(saved[path], found):
            different.append(f"{path}: {why}")
    if different:
        more = [f"... and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
        lines = "\n  ".join(different[:_SHOWN] + more)
        raise ValueError(
            f"{len(different)} of the sites of this {type(model).__name__} are not those of "
            f"{file}, which has {len(saved)} sites:\n  {lines}\nLoad it into the model that it was "
            "saved from, made by the same code with the same arguments and example_input."
        )


def build_unit(file: Path, path: str, config: Config, site: Site | None = None) -> GatedActivation:
    """The unit of a saved site, before its values are loaded.

    Args:
        file: the file that the config is from, for messages.
        path: where the unit lives.
        config: what `GatedActivation.config` gave.
        site: the site of the model's plan that the unit is for.

    Raises:
        ValueError: no unit has such a config.
    """
    # The initial values are overwritten, so torch's global generator is not used.
    generator = None if torch.get_default_device().type == "meta" else torch.Generator()
    try:
        gate = make_gate(gate_settings(config["gate"]), tuple(map(int, config["shape"])), generator)
        unit = GatedActivation(
            get_activation(config["source"]),
            get_activation(config["target"]),
            gate,
            granularity=granularity_of(config["granularity"]),
            neurons=int(config["neurons"]),
            path=path,
            overwrites_input=site is not None and site.overwrites_input,
            inplace=site is not None and site.inplace,
            input_changes=site is not None and site.input_changes,
            dims=None if site is None else len(site.shape),
            position=int(config["position"]),
            stage=str(config["stage"]),
            call=config["call"] and tuple(map(int, config["call"])),
        )
        if config["fitted"]:
            unit.add_fitted_target().offset = bool(config["offset"])
        # This is the schema: what the unit does not give back is unknown, or of a wrong type.
        again = unit.config()
        for name in {**config, **again}:
            if config.get(name) != again.get(name):
                raise ValueError(f"{name} is {config.get(name)!r}")
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: the site {path!r} cannot be built: {why}") from error
    return unit


def _difference(saved: Config, here: Config) -> str:
    """How a site of a model differs from a saved one, in words; empty where it does not."""
    saved, here = _flat(saved), _flat(here)
    return "; ".join(
        f"{name} {saved.get(name)} in the file, {here.get(name)} here"
        for name in dict.fromkeys([*saved, *here])
        if name not in _NOT_COMPARED and saved.get(name) != here.get(name)
    )


def _flat(config: Config) -> Config:
    """A config with the settings of its gate and its granularity beside the others."""
    flat: Config = {}
    for name, value in config.items():
        parts = dict(value) if isinstance(value, dict) else {"name": value}
        flat |= {name: parts.pop("name", None), **parts}
    return flat


def _check_text(path: str, activation: Activation) -> None:
    text = str(activation)
    try:
        same = get_activation(text) == activation
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"{path}: {text!r} does not read back as the same activation; parameters of a "
            "registered activation have to be numbers, strings or tuples of these."
        )
