"""What adapters share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_from(model: nn.Module, package: str) -> bool:
    """Whether the model's class, or one that it derives from, is defined in a package."""
    return any(cls.__module__.split(".")[0] == package for cls in type(model).__mro__)


def zero_batch(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Two examples of this size, such as (channels, height, width), in the model's dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(2, *size, dtype=parameter.dtype, device=parameter.device)


def id_batch(model: nn.Module, length: int, token: int = 0) -> Tensor:
    """Two sequences that repeat one token, on the model's device."""
    device = next(model.parameters(), torch.zeros(())).device
    return torch.full((2, length), token, dtype=torch.int64, device=device)


def block_stages(model: nn.Module, containers: Iterable[str]) -> dict[str, tuple[str]]:
    """One stage for each child of the modules at these paths, under the child's path."""
    paths = [
        f"{container}.{name}"
        for container in containers
        for name, _ in model.get_submodule(container).named_children()
    ]
    return {path: (path,) for path in paths}
