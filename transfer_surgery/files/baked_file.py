"""save_baked and load_baked: a network with plain activations in a file, and back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._running import copied
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.files.gates_file import insert_modules, plan_for, state_key
from transfer_surgery.files.model_file import build_model, load_weights, make_model, spec_in
from transfer_surgery.files.model_spec import ModelSpec
from transfer_surgery.files.precision import FIELD, precision_of_buffers
from transfer_surgery.files.safetensors_file import read, write
from transfer_surgery.files.unit_config import (
    Config,
    build_unit,
    configs_of,
    plain_path,
    sites_in,
    unwrap,
)
from transfer_surgery.sites import Site
from transfer_surgery.surgery import (
    FoldReport,
    bake,
    drop_folded_sites,
    final_gates,
    fold_targets,
    outcome_of,
    plain_module,
)
from transfer_surgery.units import FittedActivation, HardConcrete, gated_activations


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
    nothing was matched, these are the names of the original model's, and no others. Folding is done
    here, and not before, because the file describes the sites of the model with gates.

    Args:
        model: a converted model, also inside DistributedDataParallel or ``torch.compile``; it is
            not changed. What is baked is a copy of its modules, which shares all tensors with it
            unless they are folded.
        file: the file, usually ``.safetensors``; folders on the way to it are made.
        made_by: how the model is made before its conversion.
        harden: round gates between 0 and 1, as `bake` does.
        fold: an example input, with which `fold_targets` is called; None: it is not.

    Returns:
        What `fold_targets` returns; None without `fold`.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model is not converted or cannot be baked, it does not run on `fold`, or the
            file exists and holds something else.
        TypeError: the model is sharded by FSDP2; the message says what to do.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert, match_targets, swap_targets
        >>> spec = ModelSpec("test_resnet", {"num_classes": 10}, (3, 32, 32))
        >>> model, x = spec.build().eval(), torch.randn(8, 3, 32, 32)
        >>> _ = match_targets(convert(model, "sin", example_input=x, include="act1"), [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_baked(swap_targets(model), f"{folder}/baked", spec, fold=x)
        >>> report.rows[0].path, report.rows[0].before
        ('act1', 'bn1')
    """
    check_arguments(save_baked, locals())
    model = unwrap(model)
    check_not_sharded(model)
    sites = configs_of(model)
    for path, unit in gated_activations(model):
        outcome = outcome_of(final_gates(path, unit, harden))
        # Nothing of the gates is left but their number.
        sites[plain_path(path)] |= {"gate": HardConcrete().to_dict(), "outcome": outcome}
    # Baking writes into no tensor, folding does.
    shared = (*model.parameters(), *model.buffers()) if fold is None else ()
    with warnings.catch_warnings():
        # They are about configs of transformers, which this file does not need.
        warnings.simplefilter("ignore", RuntimeWarning)
        baked = bake(copied(model, shared), harden)
    report = None if fold is None else fold_targets(baked, fold)
    tensors = {plain_path(key): value for key, value in baked.state_dict().items()}
    about = {FIELD: precision_of_buffers(baked), "sites": sites}
    write(Path(file), "baked", {"made_by": made_by.to_dict(), **about}, tensors)
    return report


def load_baked(file: str | os.PathLike[str]) -> nn.Module:
    """The baked network of a file that `save_baked`, or the command ``bake``, wrote.

    The file names the code that makes the original model, and that code is run: load files that you
    trust. Its activations are then replaced by plain modules.

    Args:
        file: a file of `save_baked` or of the command.

    Returns:
        The network as `bake` left it, and `fold_targets` where it was folded, on the CPU. As any
        network that has just been made it is in training mode: call ``eval()`` to predict.

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
    check_arguments(load_baked, locals())
    return load_network(file, "baked")[1]


def load_network(file: str | os.PathLike[str], *kinds: str) -> tuple[ModelSpec, nn.Module]:
    """The network of a file, with gates or baked, and how it was made before its conversion.

    Args:
        file: a file of `save_model` or of `save_baked`.
        kinds: which of these it may be, ``"model"`` or ``"baked"``; none given: either.

    Raises:
        ImportError: safetensors, or the zoo that makes the model, is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, foreign or too new, or the model has changed since.
    """
    file = Path(file)
    about, tensors = read(file, *(kinds or ("model", "baked")))
    spec = spec_in(file, about)
    build = build_model if about["kind"] == "model" else _build_baked
    return spec, build(file, spec, about, tensors)


def _build_baked(
    file: Path, spec: ModelSpec, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    sites = sites_in(file, about)
    outcomes = {path: site.pop("outcome", None) for path, site in sites.items()}
    model = make_model(file, spec)
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
    drop_folded_sites(model)
    load_weights(model, tensors, file, about)
    return model


def _plain(file: Path, path: str, config: Config, site: Site, outcome: Any) -> nn.Module:
    """The module at a site, before its values are loaded."""
    if outcome not in ("target", "mixed"):
        raise ValueError(f"{file}: the site {path!r} has the outcome {outcome!r}.")
    unit = build_unit(file, path, config, site)
    z = torch.full(unit.gate.shape, 0.0 if outcome == "target" else 0.5)
    return plain_module(unit, z)


def _drop_folded(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take away the numbers that `fold_targets` moved, and add the biases that it made."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            saved = tensors.get(state_key(path, name))
            if saved is None and isinstance(module, FittedActivation):
                module._parameters[name] = None
            elif saved is not None and parameter is None:
                module._parameters[name] = nn.Parameter(torch.empty_like(saved))
