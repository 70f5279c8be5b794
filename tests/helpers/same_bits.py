"""Equality bit for bit."""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def assert_same_bits(one: Any, other: Any) -> None:
    """Two models, or two trees of tensors and plain values, hold the same under the same names."""
    if isinstance(one, nn.Module):
        one, other = one.state_dict(), other.state_dict()
    ones, structure = pytree.tree_flatten_with_path(one)
    others, wanted = pytree.tree_flatten(other)
    assert structure == wanted
    for (path, a), b in zip(ones, others, strict=True):
        assert type(a) is type(b), path
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path
