"""What a forward pass returned, whatever its structure: equality, dependence on the input, a loss.

Zoos return tensors, tuples, dicts of tensors and, from detectors, a list with a dict per image;
language models also objects that hold their caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def equal(first: Any, second: Any) -> bool:
    """Whether all values are the same bit for bit; a NaN equals a NaN in the same place."""
    leaves, structure = pytree.tree_flatten(first)
    others, other_structure = pytree.tree_flatten(second)
    return structure == other_structure and all(map(_equal, leaves, others))


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        if type(first) is type(second) and first is not second and hasattr(first, "__dict__"):
            return equal(vars(first), vars(second))
        return bool(first == second)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if torch.equal(first, second):
        return True
    nan = first.isnan()
    return torch.equal(nan, second.isnan()) and torch.equal(first[~nan], second[~nan])


def finite_share(output: Any) -> float:
    """Share of the values that are finite; below 1, equality says less."""
    numbers = [leaf for leaf in _tensors(output) if leaf.is_floating_point() and leaf.numel()]
    finite = sum(int(leaf.isfinite().sum()) for leaf in numbers)
    return finite / max(1, sum(leaf.numel() for leaf in numbers))


def depends_on_input(output: Any) -> bool:
    """Whether the results of the two examples differ; where not, equality would say nothing."""
    if isinstance(output, list) and len(output) == 2 and not isinstance(output[0], Tensor):
        return not equal(*output)
    batches = [leaf for leaf in _tensors(output) if leaf.dim() and leaf.shape[0] == 2]
    return any(not equal(*batch) for batch in batches)


def mean_square(output: Any) -> Tensor:
    """A loss that every floating-point output takes part in."""
    terms = [t.float().square().mean() for t in _tensors(output) if t.requires_grad]
    if not terms:
        raise ValueError("no output of the training forward has a gradient")
    return torch.stack(terms).sum()


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
