"""How often new inputs leave the range that a target was fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfer_surgery.matching.ranks import over_ranks

_PARTS = 8


def share_outside(calls: Sequence[Tensor]) -> float:
    """The share of values that lie outside of the range of their group in other inputs.

    The inputs are divided into eight parts, and each part is compared with the other seven. So this
    is an estimate of what inputs will do that were not there at the fit.

    Args:
        calls: the values of each call of a site, ``(groups, N)``, example by example.

    Examples:
        >>> share_outside([torch.arange(16.0)[None]])  # 0 and 1, 14 and 15
        0.25
    """
    # A batch is a part. Where there are few batches, their examples are divided.
    pieces = -(-_PARTS // max(len(calls), 1))
    parts: list[list[Tensor]] = [[] for _ in range(_PARTS)]
    for index, piece in enumerate(p for call in calls for p in call.tensor_split(pieces, 1)):
        if piece.shape[1]:
            parts[index % _PARTS].append(piece)
    like = calls[0]
    lowest, highest = like.new_full((2, _PARTS, len(like)), torch.inf)
    highest = -highest
    for index, part in enumerate(parts):
        for piece in part:
            lowest[index] = torch.minimum(lowest[index], piece.amin(1))
            highest[index] = torch.maximum(highest[index], piece.amax(1))
    (lowest,), (highest,) = over_ranks([lowest], "MIN"), over_ranks([highest], "MAX")
    outside = counted = 0
    for index, part in enumerate(parts):
        others = [other for other in range(_PARTS) if other != index]
        low, high = lowest[others].amin(0), highest[others].amax(0)
        for piece in part:
            outside += int(((piece < low[:, None]) | (piece > high[:, None])).sum())
            counted += piece.numel()
    found = torch.tensor([outside, counted], dtype=torch.float64, device=like.device)
    outside, counted = over_ranks([found])[0].tolist()
    return float(outside / counted)
