"""save_model and load_model: a converted model in a folder, with all that makes it again."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

from torch import Tensor, nn

from transfer_surgery.files.gates_file import load_gates, save_gates, state_key
from transfer_surgery.files.model_spec import ModelSpec
from transfer_surgery.files.safetensors_file import GATES, replace_file, require_safetensors
from transfer_surgery.units import gated_activations

SPEC, WEIGHTS = "model.json", "model.safetensors"
_FORMAT, _VERSION = "transfer_surgery.model", 1


def save_model(
    model: nn.Module, folder: str | os.PathLike[str], made_by: ModelSpec | None = None
) -> None:
    """Save a converted model: gates as `save_gates` does, its weights, and how it is made.

    Args:
        model: a converted model.
        folder: a folder of its own; it is made where there is none.
        made_by: how the model is made before its conversion; None: as the folder says already.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: `made_by` is None, and the folder holds no model yet.
        ValueError: the model is not converted, or the folder is another program's.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import convert
        >>> spec = ModelSpec("test_resnet", {"num_classes": 10}, (3, 32, 32))
        >>> model = spec.build()
        >>> _ = convert(model, "sin", example_input=spec.example_input(model))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, folder, spec)
        ...     load_model(folder).act1
        GatedActivation(
          relu -> sin, channel
          (gate): HardConcreteGate(hard_concrete, shape=(32,))
        )
    """
    safetensors = require_safetensors()
    folder = Path(folder)
    spec = read_spec(folder) if made_by is None else made_by
    tensors = base_state(model)
    save_gates(model, folder)
    text = json.dumps({"format": _FORMAT, "version": _VERSION, **spec.to_dict()}, indent=2)
    replace_file(folder / SPEC, text.encode())
    metadata = {"format": "pt", "gates": _digest(folder)}
    replace_file(folder / WEIGHTS, safetensors.torch.save(tensors, metadata))


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The converted model that `save_model`, or the command ``convert``, put into a folder.

    Raises:
        ImportError: safetensors, or the zoo that makes the model, is not installed.
        FileNotFoundError: there is no folder, or no model in it.
        ValueError: a file is damaged, foreign, too new, or of another save than the others; the
            model has changed since.
    """
    safetensors = require_safetensors()
    folder = Path(folder)
    spec = read_spec(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}: the save was never finished.")
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            gates = (file.metadata() or {}).get("gates")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}.") from error
    model = spec.build()
    load_weights(model, tensors, f"{folder / WEIGHTS}")
    load_gates(model, folder, spec.example_input(model))
    if gates != _digest(folder):
        raise ValueError(
            f"{folder}: {WEIGHTS} and {GATES} are of different saves, as when one was interrupted "
            "or save_gates wrote here. Save both with save_model."
        )
    return model


def read_spec(folder: Path) -> ModelSpec:
    """How the model of a folder is made.

    Raises:
        FileNotFoundError: there is no folder, or no model in it.
        ValueError: the file is damaged, foreign or too new.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one that `convert` made.")
    if not (folder / SPEC).is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds no {SPEC}, which says how its model is made; give a folder that "
            f"`convert` or save_model made. It holds: {held}."
        )
    try:
        return spec_from_json((folder / SPEC).read_text(encoding="utf-8"), _FORMAT, _VERSION)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / SPEC}: {error}.") from error


def spec_from_json(text: str, form: str, newest: int) -> ModelSpec:
    """The model of a JSON text, after a look at its format and version.

    Raises:
        ValueError: it is of another program or a newer version, or damaged.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != form:
        raise ValueError("it was written by another program")
    if type(data.get("version")) is not int or data["version"] > newest:
        raise ValueError(
            f"it has version {data.get('version')}, this transfer_surgery reads up to {newest}: "
            "upgrade"
        )
    return ModelSpec.from_dict(data)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """What a converted model's ``state_dict()`` held before, on the CPU, without shared memory."""
    units = {state_key(p, k) for p, unit in gated_activations(model) for k in unit.state_dict()}
    state = model.state_dict()
    return {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in state.items()
        if key not in units
    }


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load a state strictly.

    Raises:
        ValueError: naming what is missing, too much, or of another shape.
    """
    state = model.state_dict()
    wrong = [f"{key} is missing" for key in state if key not in tensors]
    wrong += [f"{key} is not the model's" for key in tensors if key not in state]
    wrong += [
        f"{key} is {tuple(tensors[key].shape)}, the model's {tuple(value.shape)}"
        for key, value in state.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:5] + ["..."] * (len(wrong) > 5))
        raise ValueError(
            f"{source} does not fit this {type(model).__name__} ({len(wrong)} of {len(state)} "
            f"tensors): it was saved from another model, or one with other arguments.\n  {shown}"
        )
    model.load_state_dict(tensors)


def _digest(folder: Path) -> str:
    return sha256((folder / GATES).read_bytes()).hexdigest()
