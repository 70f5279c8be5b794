"""Equality bit for bit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def assert_same_bits(one: Any, other: Any) -> None:
    """Two models, or trees of tensors and plain values, hold the same under the same names."""
    ones, structure = pytree.tree_flatten_with_path(_plain(one))
    others, wanted = pytree.tree_flatten(_plain(other))
    assert structure == wanted
    for (path, a), b in zip(ones, others, strict=True):
        assert type(a) is type(b), path
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def _plain(held: Any) -> Any:
    """A model as its state, and any mapping as a dict."""
    held = held.state_dict() if isinstance(held, nn.Module) else held
    return dict(held) if isinstance(held, Mapping) else held
