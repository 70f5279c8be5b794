"""One safetensors file: tensors, and in its metadata JSON that says what they are."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from transfer_surgery._sharding import gathered

_KEY, _VERSION = "transfer_surgery", 1


def write(file: Path, kind: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file as a whole; in a distributed run rank 0 does.

    Args:
        file: the file; folders on the way to it are made.
        kind: what it holds: ``"gates"``, ``"model"`` or ``"baked"``.
        about: what the tensors are, as JSON has it.
        tensors: the tensors by name, on any device. Sharded ones are gathered, on every rank.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file exists and this library did not write it, or it is of another kind;
            `about` is not JSON; a value at a site is NaN, which no loader reads.
    """
    safetensors = _require_safetensors()
    values = {k: gathered(v).detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    # Every rank has gathered the values, so all of them raise, or none.
    for key, value in values.items():
        if is_below(key, about["sites"]) and value.isnan().any():
            raise ValueError(f"{key} has values that are not a number: {file} is not written.")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    check_replaceable(file, kind)
    try:
        text = json.dumps({"kind": kind, "version": _VERSION, **about})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot hold what describes this model: {error}.") from error
    data = safetensors.torch.save(values, {"format": "pt", _KEY: text})
    replace_file(file, lambda path: path.write_bytes(data))


def read(file: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about its tensors, and these, on the CPU.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, too new, of another program, or of none of these kinds.
    """
    if not file.is_file():
        why = "is a folder" if file.is_dir() else "is not a file" if file.exists() else ""
        raise FileNotFoundError(f"{file} {why or 'does not exist'}.")
    metadata, tensors = read_tensors(file)
    try:
        about = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise ValueError(f"{file} was written by another program, not by transfer_surgery.")
    if about["version"] > _VERSION:
        raise ValueError(
            f"{file} has version {about['version']}, and this transfer_surgery reads versions up "
            f"to {_VERSION}: upgrade it."
        )
    if about["version"] < _VERSION:
        raise ValueError(f"{file} is damaged: no file has version {about['version']}.")
    if about.get("kind") not in kinds:
        raise ValueError(f"{file} holds {about.get('kind')!r}, not {' or '.join(kinds)}.")
    return about, tensors


def read_tensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of any safetensors file; the tensors stay on the disk until used.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is damaged.
    """
    safetensors = _require_safetensors()
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return opened.metadata() or {}, tensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged, or is not a safetensors file: {error}.") from error


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Replace a file as a whole: at any moment its name means the old or the new content.

    The new file keeps the mode of the old one. Where the name is a symbolic link, the file that it
    points to is replaced.

    Args:
        file: the file; folders on the way to it are made.
        write: is called with a path in a new folder, which only this user can read, and writes
            there. What it writes beside that path goes beside the file.
    """
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
        write(Path(folder, file.name))
        # A file beside it, whose name is longer, comes first: the file itself refers to it.
        for written in sorted(Path(folder).iterdir(), reverse=True):
            with written.open("rb+") as opened:
                os.fsync(opened.fileno())
            place = file.with_name(written.name)
            if place.exists():
                shutil.copymode(place, written)
            os.replace(written, place)
    if os.name == "posix":  # the new name is on the disk only once its folder is
        folder_number = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder_number)
        finally:
            os.close(folder_number)


def is_below(key: str, paths: Mapping[str, Any]) -> bool:
    """Whether a key of a state dict belongs to a module at one of these paths."""
    names = key.split(".")
    return any(".".join(names[:length]) in paths for length in range(len(names)))


def check_replaceable(file: Path, kind: str) -> None:
    """Raise where something would be lost: a file of another program, or of another kind."""
    if not file.exists() or (file.is_file() and file.stat().st_size == 0):
        return
    try:
        read(file, kind)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error} It is not replaced: choose another file.") from error


def _require_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "gates and models are kept in safetensors files: "
            "pip install 'transfer-surgery[checkpoints]'"
        ) from error
    return safetensors
