"""What adapters of image zoos share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["image_batch", "is_from"]


def is_from(model: nn.Module, package: str) -> bool:
    """Whether the model's class, or one that it derives from, is defined in a package."""
    return any(cls.__module__.split(".")[0] == package for cls in type(model).__mro__)


def image_batch(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Two images of ``size`` (channels, height, width) in the model's dtype, on its device."""
    parameter = next(model.parameters(), torch.zeros(()))
    return torch.zeros(2, *size, dtype=parameter.dtype, device=parameter.device)
