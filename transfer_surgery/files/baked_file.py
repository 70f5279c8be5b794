"""A baked network in one safetensors file, and back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.files.gate_config import GateConfig
from transfer_surgery.files.gates_file import build_unit, describe, insert_gates, state_key
from transfer_surgery.files.model_file import load_weights, spec_from_json
from transfer_surgery.files.model_spec import ModelSpec
from transfer_surgery.files.safetensors_file import replace_file, require_safetensors
from transfer_surgery.files.site_config import SiteConfig
from transfer_surgery.surgery import bake, fold_targets
from transfer_surgery.units import TargetParameters, gated_activations

_FORMAT, _VERSION = "transfer_surgery.baked", 1
# What a site was baked to, and a log_alpha whose gates are baked to the same.
_STARTS = {"source": 9.0, "target": -9.0, "mixed": 0.0}


def save_baked(
    model: nn.Module,
    file: str | os.PathLike[str],
    made_by: ModelSpec,
    *,
    harden: bool = False,
    fold: Any = None,
) -> nn.Module:
    """Bake a converted model and write it to a file, which `load_baked` reads.

    The tensors are the baked model's ``state_dict()``. Where all gates of a site were 0 or 1 and
    nothing was matched, these are the names of the original model's, and no others.

    Args:
        model: a converted model; it is baked.
        file: the file, by custom ``.safetensors``.
        made_by: how the model is made before its conversion.
        harden: as for `bake`.
        fold: an example input, with which `fold_targets` is called; None: it is not.

    Returns:
        The same model object, baked.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model is not converted, or cannot be baked.
    """
    safetensors = require_safetensors()
    config, baked = describe(model), _outcomes(model, harden)
    bake(model, harden)
    if fold is not None:
        fold_targets(model, fold)
    about = {"format": _FORMAT, "version": _VERSION, **made_by.to_dict()}
    about |= {"gates": json.loads(config.to_json()), "baked": baked}
    metadata = {"format": "pt", "transfer_surgery": json.dumps(about)}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
    replace_file(Path(file), safetensors.torch.save(tensors, metadata))
    return model


def load_baked(file: str | os.PathLike[str]) -> nn.Module:
    """The baked network of a file that `save_baked`, or the command ``bake``, wrote.

    The zoo makes the original model, whose activations are then replaced by plain modules.

    Raises:
        ImportError: safetensors, or the zoo that makes the model, is not installed.
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, foreign or too new, or the model has changed since.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert, swap_targets
        >>> spec = ModelSpec("test_resnet", {"num_classes": 10}, (3, 32, 32))
        >>> model = spec.build()
        >>> _ = swap_targets(convert(model, "sin", example_input=spec.example_input(model)))
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     _ = save_baked(model, file.name, spec)
        ...     load_baked(file.name).act1
        ActivationModule(sin)
    """
    return read_baked(Path(file))[0]


def read_baked(file: Path) -> tuple[nn.Module, ModelSpec]:
    """`load_baked`, and how the original model is made."""
    about, tensors = _read(file)
    try:
        spec = spec_from_json(about, _FORMAT, _VERSION)
        data = json.loads(about)
        config = GateConfig.from_json(json.dumps(data["gates"]))
        outcomes = {site.path: _STARTS[data["baked"][site.path]] for site in config.sites}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no baked network of this library: {error}.") from error
    config.refuse_unknown()
    config = replace(
        config, sites=tuple(replace(s, gate={"name": "hard_concrete"}) for s in config.sites)
    )
    starts = [_start(site, outcomes[site.path]) for site in config.sites]
    values = {key: value for each in starts for key, value in each.items()}
    model = spec.build()
    insert_gates(model, config, values, spec.example_input(model))
    bake(model)
    _fit_parameters(model, tensors)
    load_weights(model, tensors, str(file))
    return model, spec


def _outcomes(model: nn.Module, harden: bool) -> dict[str, str]:
    """For each site, what `bake` makes of it."""
    found = {}
    for path, unit in gated_activations(model):
        z = unit.gate.predict()
        kept, transferred = (z > 0.5, z <= 0.5) if harden else (z == 1, z == 0)
        found[path] = "source" if kept.all() else "target" if transferred.all() else "mixed"
    return found


def _start(site: SiteConfig, log_alpha: float) -> dict[str, Tensor]:
    unit = build_unit(site)
    unit.log_alpha.data.fill_(log_alpha)
    return {state_key(site.path, key): value for key, value in unit.state_dict().items()}


def _fit_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take away the numbers that `fold_targets` moved, and add the biases that it made."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            saved = tensors.get(state_key(path, name))
            if saved is None and isinstance(module, TargetParameters):
                module._parameters[name] = None
            elif saved is not None and parameter is None:
                module._parameters[name] = nn.Parameter(torch.empty_like(saved))


def _read(file: Path) -> tuple[str, dict[str, Tensor]]:
    safetensors = require_safetensors()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            about = (opened.metadata() or {}).get("transfer_surgery", "{}")
            return about, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}.") from error
