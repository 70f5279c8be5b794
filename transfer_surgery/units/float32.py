"""Modules whose parameters stay float32, whatever dtype the model around them is converted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """Follows the model to its device but stays float32 under ``half()`` and ``to(bfloat16)``.

    Examples:
        >>> module = Float32Module()
        >>> module.register_buffer("one", torch.ones(()))
        >>> module.to(torch.bfloat16).one.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        return self
