"""The precision of a model in a file: of its tensors, and of the buffers that it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.files.unit_config import plain_path

FIELD = "buffers"
"""Where a file says it of buffers that are not persistent."""


def precision_of_buffers(model: nn.Module) -> dict[str, str]:
    """Name to precision of each floating-point buffer that the state dict leaves out."""
    saved = model.state_dict()
    return {
        plain_path(name): str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point()
    }


def take_precision(
    model: nn.Module, tensors: Mapping[str, Tensor], about: Mapping[str, Any], file: Path
) -> None:
    """Give a model the precision of the tensors in a file, and of the buffers that it describes.

    Raises:
        ValueError: the file says of a buffer what is no floating-point precision.
    """
    described = about.get(FIELD, {})
    buffers = dict(model.named_buffers())
    for name, text in described.items() if isinstance(described, dict) else [("", described)]:
        dtype = getattr(torch, text, None) if isinstance(text, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{file} is damaged: {text!r} is no precision of a buffer.")
        if name in buffers:
            buffers[name].data = buffers[name].data.to(dtype)
    for key, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(tensors[key].dtype)
