"""Saved gates without their model: enough to report them."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from transfer_surgery.files.gates_file import build_unit, fill_units
from transfer_surgery.files.safetensors_file import read_files


def read_gates(folder: str | os.PathLike[str]) -> nn.Module:
    """The units that `save_gates` saved, at their paths in otherwise empty modules.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no folder, or no such checkpoint in it.
        ValueError: a file is damaged, foreign or too new, or an activation or gate is not
            registered.
    """
    config, tensors = read_files(Path(folder))
    config.refuse_unknown()
    units = {site.path: build_unit(site) for site in config.sites}
    fill_units(units, tensors)
    if "" in units:
        return units[""]
    root = nn.Module()
    for path, unit in units.items():
        module = root
        *holders, name = path.split(".")
        for holder in holders:
            if holder not in module._modules:
                module._modules[holder] = nn.Module()
            module = module.get_submodule(holder)
        module._modules[name] = unit
    return root
