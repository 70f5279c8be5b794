"""The budget projection, which makes gates follow a `TransferSchedule`.

After every optimizer step one common offset is added to all ``log_alpha`` (of a group), such that
the mean of ``P(z != 0)`` equals the schedule's budget. What the gates learned relative to each
other decides who goes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transfer_surgery._sharding import shard_like
from transfer_surgery.transfer.schedule import count_of
from transfer_surgery.units import Gate

# Budgets closer than this to 0 or 1 mean no more than a gate at its end: converted gates,
# log_alpha ~ N(8, 1), have 1 - mean P(z != 0) = 1.1e-4.
_MARGIN = 1e-4

# Where gates are left at the end, as logit of P(z != 0): 1 - P = 6.8e-5 as at log_alpha = 8, where
# a converted network starts, and the mirror of it. Eval gates are then exactly 1 and 0.
_END = 9.6

# Of Newton's method: enough for any spread of log_alpha below 200, and enough from the step before.
# Fixed numbers, since to look whether it converged would synchronise with the device.
_ITERATIONS, _ITERATIONS_FROM_NEAR = 16, 5

# As a difference of logits: at most 2.5e-6 of a budget.
_NEAR_ENOUGH = 1e-5


@torch.no_grad()
def project(
    gates: Sequence[Gate],
    progress: float,
    *,
    fraction: float = 1.0,
    skip: Tensor | None = None,
    near: bool = False,
) -> None:
    """Move gates by an offset: their mean ``P(z != 0)`` becomes ``1 - fraction * progress``.

    With ``fraction < 1`` the ``ceil(fraction * n)`` gates with the lowest ``P(z != 0)`` go, and the
    others stay at their source. One offset for *all* gates could only lower the mean: it would end
    with every gate between 0 and 1 instead of a share at 0 and the others at 1.

    At ``progress == 1`` every eval gate is exactly 0 or 1, whatever the loss asks for. At
    ``progress == 0`` gates that wait at the source stay as they are; they are moved back there if
    they have left it. No step synchronises with the device. Gates that FSDP2 shards are gathered,
    one collective each, and every rank computes the same.

    Args:
        gates: gates with a ``log_alpha``; they are changed in place.
        progress: from 0 (all at the source) to 1 (those that go are at the target).
        fraction: the share of gates that go, in (0, 1].
        skip: a scalar on the gates' device; where it is not 0, nothing is moved (the ``found_inf``
            of a GradScaler whose optimizer skips the step on the device).
        near: the gates were projected one step ago: fewer iterations, and what may be missing
            after a sudden move comes with the steps that follow.

    Examples:
        >>> from transfer_surgery.units import make_gate
        >>> gate = make_gate("hard_concrete", (1000,))
        >>> project([gate], 0.25)
        >>> round(gate.probability().mean().item(), 4)
        0.75
        >>> project([gate], 1.0, fraction=0.3)
        >>> int((gate.predict() == 0).sum()), int((gate.predict() == 1).sum())
        (300, 700)
    """
    if not gates:
        return
    # Gather all gates on one device; a model may be spread over several.
    log_alphas = [gate.log_alpha.detach() for gate in gates]
    device = log_alphas[0].device
    logits = torch.cat([gate.logit().flatten().to(device) for gate in gates])

    # Choose the gates that go. Before the transfer begins that is all of them.
    number = logits.numel()
    going = number if progress <= 0 else max(1, count_of(fraction, number))
    at = slice(None) if going == number else logits.topk(going, largest=False, sorted=False).indices

    # The others return to the source, a little past the end: gates that are there do not move.
    offset = torch.where(logits < _END, _END + 0.01 - logits, 0.0)
    iterations = _ITERATIONS_FROM_NEAR if near else _ITERATIONS
    offset[at] = _common_offset(logits[at], progress, iterations)
    if skip is not None:
        offset = torch.where(skip.to(device) != 0, 0.0, offset)

    # Write each site's part, or this rank's shard of it.
    parts = torch.split(offset, [log_alpha.numel() for log_alpha in log_alphas])
    own = [
        shard_like(part.view(log_alpha.shape).to(log_alpha.device), log_alpha)
        for log_alpha, part in zip(log_alphas, parts, strict=True)
    ]
    torch._foreach_add_(log_alphas, own)


@torch.no_grad()
def move_to_ends(gate: Gate, kept: Tensor) -> None:
    """Move each gate of a site to an end: the kept ones to the source, the others to the target.

    Args:
        gate: the gates of the site; changed in place.
        kept: a boolean mask of the gates' shape.
    """
    logits = gate.logit()
    to_source = (_END + 0.01 - logits).clamp_min(0.0)
    to_target = (-_END - 0.01 - logits).clamp_max(0.0)
    gate.log_alpha.add_(torch.where(kept, to_source, to_target))


def _common_offset(logits: Tensor, progress: float, iterations: int) -> Tensor:
    """What is added to the ``log_alpha`` of each gate that goes."""
    if progress >= 1:
        highest = logits.amax()
        return torch.where(highest > -_END, -_END - 0.01 - highest, 0.0)
    offset = _offset(logits, 1 - progress, iterations)
    if progress > 0:
        return offset
    # Before the transfer begins, only gates that left the source are moved back.
    away = torch.sigmoid(logits).mean() < 1 - 5 * _MARGIN
    return torch.where(away, offset, 0.0)


def _offset(logits: Tensor, budget: float, iterations: int) -> Tensor:
    """The number ``d`` with ``mean(sigmoid(logits + d)) == budget``, to 1e-4, on the device.

    Newton's method on ``logit(mean)``, which is nearly linear in ``d``. Its slope is never above 1
    (the mean of ``p * (1 - p)`` is at most ``m * (1 - m)``), so the root is at least as far away as
    the error: a lower bound for the bracket that catches Newton where gates are widely spread.
    What is near enough stays: between two clusters of gates the slope is that of rounding.
    """
    budget = min(max(budget, _MARGIN), 1 - _MARGIN)
    goal = math.log(budget / (1 - budget))
    low, high = goal - logits.amax(), goal - logits.amin()
    d = torch.zeros_like(low).clamp(low, high)
    for _ in range(iterations):
        p = torch.sigmoid(logits + d)
        mean = p.mean()
        slope = mean - torch.dot(p, p) / p.numel()
        error = torch.logit(mean, eps=1e-6) - goal
        low = torch.where(error < 0, d - error, low)
        high = torch.where(error < 0, high, d - error)
        newton = d - error * mean * (1 - mean) / slope
        inside = (newton >= low) & (newton <= high)  # False for nan: no gate is between 0 and 1
        further = torch.where(inside, newton, (low + high) / 2)
        d = torch.where(error.abs() < _NEAR_ENOUGH, d, further)
    return d
