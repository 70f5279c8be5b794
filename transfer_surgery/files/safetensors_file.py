"""One safetensors file: tensors, and in its metadata JSON that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from transfer_surgery._sharding import gathered
from transfer_surgery.files.replacing import check_is_file, check_replaceable, replace_file

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
            `about` is not JSON; a value is no dense tensor; one at a site is NaN, which no loader
            reads.
        OSError: it cannot be written, as on a full disk. The file is then as it was.
    """
    safetensors = _require_safetensors()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    writes = not distributed or torch.distributed.get_rank() == 0
    values: dict[str, Tensor] = {}
    bad: list[str] = []
    storages: set[int] = set()
    for key, tensor in tensors.items():
        value = gathered(tensor)
        if not _is_dense(value):
            bad.append(f"{key} is no dense tensor of numbers")
            continue
        value = value.detach()
        if is_below(key, about["sites"]) and value.isnan().any():
            bad.append(f"{key} has values that are not a number")
        if writes:
            value = value.cpu().contiguous()
            # Tied tensors are written one by one: safetensors refuses two of one memory.
            storage = value.untyped_storage().data_ptr()
            values[key] = value.clone() if storage in storages else value
            storages.add(storage)
    # Every rank has gathered all values, so all of them raise, or none.
    if bad:
        raise ValueError(f"{bad[0]}: {file} is not written.")
    if not writes:
        return
    check_not_lost(file, kind)
    try:
        text = json.dumps({"kind": kind, "version": _VERSION, **about})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot hold what describes this model: {error}.") from error
    metadata = {"format": "pt", _KEY: text}
    replace_file(file, lambda path: safetensors.torch.save_file(values, path, metadata))


def check_not_lost(file: Path, kind: str) -> None:
    """Raise where writing to a file would replace something other than a file of this kind.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file exists, and is a folder, or holds something else.
    """
    _require_safetensors()
    if file.is_dir():
        raise ValueError(
            f"{file} is a folder. It is not replaced: choose a file, such as "
            f"{file / 'model.safetensors'}."
        )
    check_replaceable(file, lambda path: read(path, kind))


def read(file: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says about its tensors, and these, on the CPU.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no file.
        ValueError: it is damaged, too new, of another program, or of none of these kinds.
    """
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
        FileNotFoundError: there is no file.
        ValueError: the file is damaged.
    """
    safetensors = _require_safetensors()
    check_is_file(file)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return opened.metadata() or {}, tensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged, or is not a safetensors file: {error}.") from error


def _is_dense(value: Any) -> bool:
    """Whether a value of a state dict is a tensor whose numbers safetensors can write."""
    plain = type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def is_below(key: str, paths: Mapping[str, Any]) -> bool:
    """Whether a key of a state dict belongs to a module at one of these paths."""
    names = key.split(".")
    return any(".".join(names[:length]) in paths for length in range(len(names)))


def _require_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "gates and models are kept in safetensors files: "
            "pip install 'transfer-surgery[checkpoints]'"
        ) from error
    return safetensors
