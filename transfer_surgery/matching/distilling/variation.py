"""Inputs between and around the given ones, so that few examples teach a function and not a list.

The teacher answers any input, so no label is missing. With ``x'`` another example of the batch, and
the mean and the deviation of each element over the batch, an example ``x`` becomes

    mean + r * (x + u * (x' - x) - mean) + n * deviation * noise

where ``u``, ``r`` and ``n`` are drawn for each example. Each channel of images, which is axis 1, is
stretched and shifted once more, as under another light. What is the same in all examples stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.distilling.held_out import Asked, teach
from transfer_surgery.matching.output_errors import OutputErrors

_RANGE = 0.7  # r is at most so far from 1
_NOISE = 0.5  # highest n
_LIGHT = 0.3  # how much channels of images are stretched, and shifted beside their deviation
_WIDER = 1.25  # how many times as large the outputs' deviations may become
_HALVINGS = 8


def varied(batch: Any, strength: float, share: float = 1.0) -> Any:
    """A batch whose floating tensors are varied; masks of zeros and ones stay.

    Args:
        batch: what a network is called with.
        strength: from 0, which changes nothing, to 1, which mixes any shares of two examples.
        share: of the examples, drawn at random; the others stay.
    """
    drawn: dict[int, tuple[Tensor, Tensor]] = {}  # the same for tensors of as many rows

    def vary(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() == 0 or len(x) < 2:
            return x
        if bool(((x == 0) | (x == 1)).all()):
            return x
        rows = len(x)
        if rows not in drawn:
            chosen = strength * (torch.rand(rows, device=x.device) < share)
            drawn[rows] = torch.randperm(rows, device=x.device), chosen
        order, chosen = drawn[rows]
        most = chosen.to(x.dtype).view(rows, *[1] * (x.dim() - 1))
        u, r, n = (most * torch.rand_like(most) for _ in range(3))
        mean, deviation = x.mean(0), x.std(0, correction=0)
        mixed = x + u * (x[order] - x) - mean
        wide = 1 + _RANGE * (2 * r - most)
        mixed = wide * mixed + _NOISE * n * deviation * torch.randn_like(x)
        if x.dim() >= 4:  # channels, and at least two axes of positions
            each = most.expand(rows, x.shape[1], *[1] * (x.dim() - 2))
            shift = deviation.mean(tuple(range(1, x.dim() - 1)), keepdim=True)
            mixed = mixed * (1 + _LIGHT * each * (2 * torch.rand_like(each) - 1))
            mixed = mixed + _LIGHT * each * shift * torch.randn_like(each) * (deviation > 0)
        return mean + mixed

    return map_tensors(vary, batch)


def bearable_variation(
    teacher: nn.Module, given: Sequence[Asked], most: float
) -> tuple[float, list[Asked]]:
    """The strength with which the teacher's outputs still look like those for the given inputs.

    An image that is a mixture of two is an image. Atoms between two places may sit in each other,
    and energies explode. So the strength is halved as long as an output's deviation from its mean
    grows beyond that of the given inputs.

    Args:
        teacher: the original network, in evaluation mode.
        given: some inputs, and the outputs for these.
        most: the strength that is wanted.

    Returns:
        The strength, and these inputs varied; none if no strength will do.
    """
    usual = _deviations(given)
    for halved in range(_HALVINGS if most else 0):
        strength = most / 2**halved
        batches = [varied(asked.batch, strength) for asked in given]
        try:
            further = [Asked(batch, teach(teacher, batch, "a varied batch")) for batch in batches]
        except Exception:  # a forward that checks its inputs
            continue
        found = _deviations(further)
        if all(found.get(name, math.inf) <= _WIDER * usual[name] for name in usual):
            return strength, further
    return 0.0, []


def _deviations(asked: Sequence[Asked]) -> dict[str, float]:
    errors = OutputErrors()
    for one in asked:
        errors.add(one.output, one.output)
    return {name: scale**0.5 for name, scale in errors.scales().items()}
