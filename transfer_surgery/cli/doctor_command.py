"""``transfer-surgery doctor``: what is installed, and what runs on what."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from transfer_surgery._table import Column, Table
from transfer_surgery.cli.options import Json
from transfer_surgery.cli.printing import show
from transfer_surgery.units import VARIABLE, compiler_error, kernel_choice

_PACKAGES = (
    "transfer-surgery",
    "torch",
    "triton",
    "timm",
    "torchvision",
    "transformers",
    "accelerate",
    "lightning",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "matplotlib",
    "typer",
)


def doctor(as_json: Json = False) -> None:
    """Show versions, extras, devices, and which kernels compute gated activations on them.

    Put the output into bug reports.

    [bold]Example[/bold]

    transfer-surgery doctor --json
    """
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    extras = {
        extra: [name for name in names if _version(name) is None]
        for extra, names in _extras().items()
    }
    devices = _devices()
    if as_json:
        show(json.dumps({"versions": versions, "missing": extras, "devices": devices}, indent=2))
        return
    rows = [_Row(name, found or "-") for name, found in versions.items()]
    rows += [_Row(f"extra {extra}", _state(extra, lacks)) for extra, lacks in extras.items()]
    for device in devices:
        rows += [_Row(device["device"], device["name"]), _Row("kernels there", device["kernels"])]
    show(str(_Findings(tuple(rows))))


@dataclass(frozen=True)
class _Row:
    name: str
    found: str


@dataclass(frozen=True, repr=False)
class _Findings(Table[_Row]):
    columns = (Column("name"), Column("found"))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """The packages that each extra needs; empty where this library itself is not installed."""
    extras: dict[str, list[str]] = {}
    if _version("transfer-surgery") is not None:
        for line in requires("transfer-surgery") or ():
            if match := re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line):
                extras.setdefault(match[2], []).append(match[1])
    return extras


def _state(extra: str, missing: list[str]) -> str:
    if not missing:
        return "installed"
    return f"lacks {', '.join(missing)}: pip install 'transfer-surgery[{extra}]'"


def _devices() -> list[dict[str, str]]:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = [{"device": "cpu", "name": cpu, "kernels": _kernels(torch.device("cpu"))}]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        device = torch.device("cuda", number)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found.append({"device": str(device), "name": name, "kernels": _kernels(device)})
    return found


def _kernels(device: torch.device) -> str:
    """What units in training use there; prediction is always eager."""
    if (choice := kernel_choice()) == "eager":
        return f"eager ({VARIABLE}=eager)"
    if error := compiler_error(device):
        return f"eager (torch.compile fails: {error})"
    return "compiled" if choice == "compiled" else "eager at first, compiled in long runs"
