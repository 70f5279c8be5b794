"""Copies that lie in memory as the original does."""

from __future__ import annotations

from torch import Tensor


def copy_with_strides(x: Tensor) -> Tensor:
    """A copy with the strides of ``x``, also of a slice, which ``clone`` makes contiguous.

    Torch computes GELU, say, by vectors or one by one depending on them, and rounds otherwise.
    """
    y = x.clone()
    if y.stride() == x.stride() or 0 in x.stride():  # an expanded tensor has no place for a copy
        return y
    return x.new_empty_strided(x.size(), x.stride()).copy_(x)
