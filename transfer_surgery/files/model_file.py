"""save_model and load_model: a converted model in a file, with all that makes it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._randomness import RandomnessKept
from transfer_surgery.files.gates_file import insert_gates, units_of
from transfer_surgery.files.model_spec import ModelSpec, UnknownModelError
from transfer_surgery.files.precision import FIELD, precision_of_buffers, take_precision
from transfer_surgery.files.safetensors_file import read, write
from transfer_surgery.files.unit_config import configs_of, plain_path, sites_and_tensors, unwrap
from transfer_surgery.units import check_gates_not_flattened

_SHOWN = 5


def save_model(
    model: nn.Module, file: str | os.PathLike[str], made_by: ModelSpec | None = None
) -> None:
    """Save a converted model: its gates as `save_gates` does, its weights, and how it is made.

    The file is replaced as a whole: after a kill it holds the old model or the new one.

    Args:
        model: a converted model, also inside DistributedDataParallel or ``torch.compile``.
        file: the file, usually ``.safetensors``; folders on the way to it are made.
        made_by: how the model is made before its conversion; None: as the file says already.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: `made_by` is None, and there is no file yet.
        ValueError: the model is not converted, a gate is NaN, FSDP 1 or ZeRO-3 has flattened the
            gates, or the file exists and holds something else. The file is then as it was.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert
        >>> spec = ModelSpec("test_resnet", {"num_classes": 10}, (3, 32, 32))
        >>> model = spec.build()
        >>> _ = convert(model, "sin", example_input=spec.example_input(model))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, f"{folder}/model.safetensors", spec)
        ...     load_model(f"{folder}/model.safetensors").act1
        GatedActivation(
          relu -> sin, channel
          (gate): HardConcreteGate(hard_concrete, shape=(32,))
        )
    """
    check_arguments(save_model, locals())
    model, file = unwrap(model), Path(file)
    check_gates_not_flattened(units_of(model))
    spec = spec_in(file, read(file, "model")[0]) if made_by is None else made_by
    tensors = {plain_path(key): value for key, value in model.state_dict().items()}
    about = {FIELD: precision_of_buffers(model), "sites": configs_of(model)}
    write(file, "model", {"made_by": spec.to_dict(), **about}, tensors)


def load_model(file: str | os.PathLike[str]) -> nn.Module:
    """The converted model of a file that `save_model`, or the command ``convert``, wrote.

    The file names the code that makes the model, and that code is run: load files that you trust.

    Args:
        file: a file of `save_model` or of the command.

    Returns:
        The model, converted, with its gates and weights, in their precision, on the CPU. As any
        model that has just been made it is in training mode, and nothing of it is frozen.

    Raises:
        ImportError: safetensors, or the zoo that makes the model, is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, foreign or too new, or the model has changed since.
    """
    check_arguments(load_model, locals())
    file = Path(file)
    about, tensors = read(file, "model")
    return build_model(file, spec_in(file, about), about, tensors)


def build_model(
    file: Path, spec: ModelSpec, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The converted model of a file whose content was read; see `load_model`."""
    sites, gates, weights = sites_and_tensors(file, about, tensors)
    model = make_model(file, spec)
    load_weights(model, weights, file, about)
    return insert_gates(model, file, sites, gates, spec.example_input(model))


def make_model(file: Path, spec: ModelSpec) -> nn.Module:
    """The model before its conversion. Its random weights are written over: they draw no numbers.

    Raises:
        ValueError: there is no such code any more, or it fails on the arguments in the file.
    """
    try:
        with RandomnessKept():
            return spec.build()
    except (UnknownModelError, RuntimeError) as error:
        raise ValueError(f"{file}: {error}") from error


def spec_in(file: Path, about: Mapping[str, Any]) -> ModelSpec:
    """How the model of a file is made, from what the file says about its tensors.

    Raises:
        ValueError: the file does not say it.
    """
    try:
        return ModelSpec.from_dict(about.get("made_by"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    file: Path,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Load a state dict strictly; floating-point numbers may have another precision.

    Args:
        model: the model.
        tensors: the state dict.
        file: where it comes from, for messages.
        about: what the file says about its tensors: the model gets their precision; None: it keeps
            its own.

    Raises:
        ValueError: the message names what is missing, unknown, or of another shape or kind.
    """
    state = model.state_dict()
    wrong = [f"{key} is missing" for key in state if key not in tensors]
    wrong += [f"{key} is not in the model" for key in tensors if key not in state]
    for key, wanted in state.items():
        found = tensors.get(key, wanted)
        if found.shape != wanted.shape:
            wrong.append(f"{key} is {tuple(found.shape)}, and {tuple(wanted.shape)} in the model")
        elif found.is_floating_point() != wanted.is_floating_point():
            wrong.append(f"{key} is {found.dtype}, and {wanted.dtype} in the model")
    if wrong:
        shown = "\n  ".join(wrong[:_SHOWN] + ["..."] * (len(wrong) > _SHOWN))
        raise ValueError(
            f"{file} does not fit this {type(model).__name__} ({len(wrong)} of {len(state)} "
            f"tensors): it was saved from another model, or one with other arguments.\n  {shown}"
        )
    if about is not None:
        take_precision(model, tensors, about, file)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # sparse ones, or ones without values
        raise ValueError(f"{file} does not fit this {type(model).__name__}: {error}") from error
