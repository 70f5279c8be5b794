"""save_baked and load_baked: a network with plain activations in a file, and back."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.files.gates_file import insert_modules, plan_for, sites_in, state_key
from transfer_surgery.files.model_file import load_weights, read_spec
from transfer_surgery.files.model_spec import ModelSpec
from transfer_surgery.files.safetensors_file import check_replaceable, read, write
from transfer_surgery.files.unit_config import Config, build_unit, configs_of
from transfer_surgery.sites import Site
from transfer_surgery.surgery import FoldReport, bake, fold_targets, plain_module
from transfer_surgery.units import HardConcrete, TargetParameters, gated_activations


def save_baked(
    model: nn.Module,
    file: str | os.PathLike[str],
    made_by: ModelSpec,
    *,
    harden: bool = False,
    fold: Any = None,
) -> FoldReport | None:
    """Write what `bake` makes of a converted model to a file, which `load_baked` reads.

    The tensors are the baked model's ``state_dict()``. Where all gates of a site were 0 or 1 and
    nothing was matched, these are the names of the original model's, and no others.

    Args:
        model: a converted model; it is not changed. What is baked is a copy of its modules, which
            shares all tensors with it.
        file: the file, usually ``.safetensors``; folders on the way to it are made.
        made_by: how the model is made before its conversion.
        harden: round gates between 0 and 1, as `bake` does.
        fold: an example input, with which `fold_targets` is called; None: it is not.

    Returns:
        What `fold_targets` returns; None without `fold`.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model is not converted or cannot be baked, or the file exists and holds
            something else.
        TypeError: the model is sharded by FSDP2; the message says what to do.
    """
    file = Path(file)
    check_replaceable(file, "baked")
    check_not_sharded(model)
    sites = configs_of(model)
    for path, unit in gated_activations(model):
        z = unit.gate.predict()
        kept, gone = (z > 0.5, z <= 0.5) if harden else (z == 1, z == 0)
        outcome = "source" if kept.all() else "target" if gone.all() else "mixed"
        # Nothing of the gates is left but their number.
        sites[path] |= {"gate": HardConcrete().to_dict(), "outcome": outcome}
    # Baking and folding put new tensors in place of old ones, and write into none.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    baked = bake(copy.deepcopy(model, shared), harden)
    report = None if fold is None else fold_targets(baked, fold)
    write(file, "baked", {"made_by": made_by.to_dict(), "sites": sites}, baked.state_dict())
    return report


def load_baked(file: str | os.PathLike[str]) -> nn.Module:
    """The baked network of a file that `save_baked`, or the command ``bake``, wrote.

    The file names the code that makes the original model, and that code is run: load files that you
    trust. Its activations are then replaced by plain modules.

    Raises:
        ImportError: safetensors, or the zoo that makes the model, is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, foreign or too new, or the model has changed since.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert, swap_targets
        >>> spec = ModelSpec("test_resnet", {"num_classes": 10}, (3, 32, 32))
        >>> model = spec.build()
        >>> _ = swap_targets(convert(model, "sin", example_input=spec.example_input(model)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_baked(model, f"{folder}/baked.safetensors", spec)
        ...     load_baked(f"{folder}/baked.safetensors").act1
        ActivationModule(sin)
    """
    file = Path(file)
    spec = read_spec(file, "baked")
    about, tensors = read(file, "baked")
    sites = sites_in(file, about)
    outcomes = {path: site.pop("outcome", None) for path, site in sites.items()}
    model = spec.build()
    plan = plan_for(model, file, sites, spec.example_input(model))
    plain = {
        path: _plain(file, path, config, plan[path], outcomes[path])
        for path, config in sites.items()
        if outcomes[path] != "source"  # there the network's own code stays
    }
    for path, module in plain.items():
        for name, _ in module.named_buffers():  # the gates of a mixture
            z = tensors.get(state_key(path, name), torch.zeros(()))
            if not ((z >= 0) & (z <= 1)).all():
                raise ValueError(f"{file}: {state_key(path, name)} has values outside 0 to 1.")
    insert_modules(model, plan, plain)
    _drop_folded(model, tensors)
    load_weights(model, tensors, file)
    return model


def holds_baked(file: Path) -> bool:
    """Whether a file is one of `save_baked`, and not one of `save_model`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is neither.
    """
    return bool(read(file, "model", "baked")[0]["kind"] == "baked")


def _plain(file: Path, path: str, config: Config, site: Site, outcome: Any) -> nn.Module:
    """The module at a site, before its values are loaded."""
    if outcome not in ("target", "mixed"):
        raise ValueError(f"{file}: the site {path!r} has the outcome {outcome!r}.")
    unit = build_unit(file, path, config, site)
    z = torch.full(unit.gate.shape, 0.0 if outcome == "target" else 0.5)
    return plain_module(unit, z)


def _drop_folded(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take away the numbers that `fold_targets` moved, and add the biases that it made."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            saved = tensors.get(state_key(path, name))
            if saved is None and isinstance(module, TargetParameters):
                module._parameters[name] = None
            elif saved is not None and parameter is None:
                module._parameters[name] = nn.Parameter(torch.empty_like(saved))
