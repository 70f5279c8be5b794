"""One safetensors file: tensors, and in its metadata JSON that says what they are."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
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
            `about` is not JSON.
    """
    safetensors = _require_safetensors()
    values = {k: gathered(v).detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    _check_replaceable(file, kind)
    try:
        text = json.dumps({"kind": kind, "version": _VERSION, **about})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot hold what describes this model: {error}.") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, safetensors.torch.save(values, {"format": "pt", _KEY: text}))


def read(file: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about its tensors, and these, on the CPU.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, too new, of another program, or of none of these kinds.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}.")
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


def replace_file(file: Path, data: bytes) -> None:
    """Replace a file as a whole: at any moment its name means the old or the new content.

    The data go to a new file beside it first. Its name is random, and it must not exist yet: what
    another user has prepared there, such as a link, is not followed.
    """
    temporary = file.with_name(f".{secrets.token_hex(16)}.tmp")
    try:
        with temporary.open("xb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on the disk only once its folder is
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_replaceable(file: Path, kind: str) -> None:
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
