"""The two files of a checkpoint of gates; each is replaced as a whole, and knows of the other."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import ModuleType

from torch import Tensor

from transfer_surgery.files.gate_config import GateConfig

CONFIG, GATES = "config.json", "gates.safetensors"


def require_safetensors() -> ModuleType:
    """The package safetensors.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "checkpoints of gates need safetensors: pip install 'transfer-surgery[checkpoints]'"
        ) from error
    return safetensors


def write_files(folder: Path, config: GateConfig, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint, so that a kill leaves the old one, the new one, or one that is refused.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the folder holds the config of another program.
    """
    safetensors = require_safetensors()
    text = config.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    before = _earlier_config(folder)
    metadata = {"format": "pt", "config": _digest(text)}
    replace_file(folder / GATES, safetensors.torch.save(tensors, metadata))
    if before != text:  # saving again replaces one file only, which cannot be done by half
        replace_file(folder / CONFIG, text.encode())


def read_files(folder: Path) -> tuple[GateConfig, dict[str, Tensor]]:
    """Read a checkpoint; the tensors are on the CPU, under their names in the file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no folder, or no checkpoint in it.
        ValueError: the files are damaged, foreign, too new, or of different saves.
    """
    safetensors = require_safetensors()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one given to save_gates.")
    for name in (CONFIG, GATES):
        if not (folder / name).is_file():
            held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise FileNotFoundError(
                f"{folder} holds no {name}, so that it is no checkpoint of save_gates, or one that "
                f"was never finished. It holds: {held}."
            )
    config, text = _read_config(folder)
    try:
        with safetensors.safe_open(folder / GATES, framework="pt") as file:
            digest = (file.metadata() or {}).get("config")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / GATES} is damaged: {error}.") from error
    if digest != _digest(text):
        raise ValueError(
            f"{folder}: {GATES} and {CONFIG} are of different saves, as when a save of other "
            "sites into this folder was interrupted. Use another checkpoint."
        )
    return config, tensors


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file as a whole: at any moment its name means the old or the new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(text: str) -> str:
    """Ties values to the config that describes them; spaces and line ends do not count."""
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def _earlier_config(folder: Path) -> str | None:
    """Text of the config that the folder holds, if any; another program's is not overwritten."""
    if not (folder / CONFIG).exists():
        return None
    try:
        return _read_config(folder)[1]
    except ValueError as error:
        raise ValueError(f"{error} Save the gates into a folder of their own.") from error


def _read_config(folder: Path) -> tuple[GateConfig, str]:
    file = folder / CONFIG
    try:
        text = file.read_text(encoding="utf-8")
        return GateConfig.from_json(text), text
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        raise ValueError(f"{file} is no checkpoint of gates: {error}.") from error
