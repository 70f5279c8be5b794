"""Bounded random samples of what a module gets and gives.

A fit of a few numbers needs a sample of the values, not all of them. Positions are drawn at random:
with a fixed stride the same places of the images would come again and again (on a trained ResNet-20
that cost 1 to 6 points of accuracy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transfer_surgery.units import Granularity

Positions = tuple[Tensor, ...] | None
"""One index tensor per axis; None: every position."""


def draw_positions(sizes: Sequence[int], count: int, seed: int) -> Positions:
    """Positions in a box of these sizes: one at random in each of `count` parts of equal length.

    Examples:
        >>> [tuple(axis.shape) for axis in draw_positions((8, 100), 50, seed=0)]
        [(50,), (50,)]
        >>> draw_positions((8, 5), 50, seed=0) is None
        True
    """
    total = math.prod(sizes)
    if total <= count:
        return None
    random = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = ((torch.arange(count) + random) * (total / count)).long().clamp_max(total - 1)
    return torch.unravel_index(flat, tuple(sizes))


def sampled_groups(x: Tensor, granularity: Granularity, count: int, seed: int) -> Tensor:
    """A copy of some of the elements that share a gate, as ``(groups, at most count)``.

    For two tensors of the same shape and the same seed these are the same elements. The result is
    in float32 or wider.

    Examples:
        >>> from transfer_surgery import PerChannel
        >>> sampled_groups(torch.zeros(8, 3, 5, 5), PerChannel(1), 20, seed=0).shape
        torch.Size([3, 20])
    """
    axes = granularity.axes(x.dim())
    rest = [size for axis, size in enumerate(x.shape) if axis not in axes]
    positions = draw_positions(rest, count, seed)
    if positions is None:
        taken = granularity.group(x.detach()).clone()
    else:
        # All groups of a position at a time, which is several times as fast as group by group.
        back = x.detach().movedim(axes, tuple(range(-len(axes), 0)))
        values = back[tuple(p.to(x.device) for p in positions)]
        taken = values.reshape(len(values), -1).t().contiguous()
    return taken.to(torch.promote_types(x.dtype, torch.float32))


def ends_of_groups(x: Tensor, granularity: Granularity) -> Tensor:
    """The lowest and the highest of all elements that share a gate, ``(groups, 2)``.

    Examples:
        >>> from transfer_surgery import PerChannel
        >>> ends_of_groups(torch.arange(6.0).view(2, 3), PerChannel(1)).tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    axes = granularity.axes(x.dim())
    if not x.numel():  # no token of the batch goes that way
        ends = torch.tensor([torch.inf, -torch.inf], device=x.device)
        return ends.expand(math.prod(granularity.gate_shape(x.shape)), 2)
    low = high = x.detach().movedim(axes, tuple(range(-len(axes), 0)))
    # Axis after axis, with the gates behind: of a channels_last tensor that is many times as fast.
    while low.dim() > len(axes):
        low, high = low.amin(0), high.amax(0)
    found = torch.stack([low, high], -1).view(-1, 2)
    return found.to(torch.promote_types(x.dtype, torch.float32))
