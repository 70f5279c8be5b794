"""Transfer schedules: what share of the gates is away from 0 at which step, and how that is kept.

The schedule is kept by a *budget projection*: after every optimizer step one common offset is added
to all ``log_alpha``, such that the mean of ``P(z != 0)`` equals the schedule's budget. What the
gates learned relative to each other decides who goes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from transfer_surgery.gates import Gate

__all__ = ["TransferSchedule", "project"]

SHAPES = ("cosine", "linear")

# Where gates are left at the end: the mirror of the start of a converted network, log_alpha = 8.
# The eval gate is then exactly 0 (1), and a sampled one too with probability 0.998.
_END = 8.0

# Budgets closer than this to 0 or 1 mean no more than a gate at its end: converted gates,
# log_alpha ~ N(8, 1), have 1 - mean P(z != 0) = 1.1e-4.
_MARGIN = 1e-4

# Enough for any spread of log_alpha below 200; from the step before, 4 are. A fixed number, since
# to look whether it converged would synchronise with the device.
_ITERATIONS = 16


@dataclass(frozen=True)
class TransferSchedule:
    """What share of the gates is to be transferred, and by when.

    Args:
        total_steps: optimizer steps of the whole training, ``epochs * steps_per_epoch``.
        fraction: share of the gates that is transferred at the end, in (0, 1]. Below 1 the gates
            with the lowest ``log_alpha`` go and the others are kept at their source.
        start: when the transfer starts, as a share of `total_steps`; before it no gate is moved.
        end: when it ends, as a share of `total_steps`; the rest is for the transferred network.
        shape: ``"cosine"`` (slow at both ends) or ``"linear"``.

    ``TransferSchedule(n, start=0, end=1, shape="linear")`` gives the paper's *Line* and *Copy* when
    the model was converted with ``gate="line"`` or ``gate="copy"``.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        section 4.1 for *Line* and *Copy*; the budget itself is ours, see DESIGN section 4.

    Example:
        >>> schedule = TransferSchedule(100, start=0.1, end=0.5)
        >>> [round(schedule.budget(step), 3) for step in (0, 10, 20, 30, 40, 50, 100)]
        [1.0, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    total_steps: int
    _: KW_ONLY
    fraction: float = 1.0
    start: float = 0.1
    end: float = 0.7
    shape: str = "cosine"

    def __post_init__(self) -> None:
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int):
            raise ValueError(
                f"total_steps={self.total_steps!r}: give a whole number of optimizer steps, "
                "e.g. epochs * len(loader)."
            )
        if self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps}: at least 1 step is needed.")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction={self.fraction}: the share of gates to transfer lies in (0, 1]."
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start={self.start}, end={self.end}: both are shares of total_steps, with "
                "0 <= start < end <= 1."
            )
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: use one of {', '.join(SHAPES)}.")

    def progress(self, step: int) -> float:
        """How far the gates that go have gone after `step` optimizer steps, from 0 to 1."""
        p = (step / self.total_steps - self.start) / (self.end - self.start)
        p = min(max(p, 0.0), 1.0)
        return (1 - math.cos(math.pi * p)) / 2 if self.shape == "cosine" else p

    def budget(self, step: int) -> float:
        """Mean of ``P(z != 0)`` over all gates after `step` optimizer steps."""
        return 1 - self.fraction * self.progress(step)


@torch.no_grad()
def project(
    gates: Sequence[Gate], progress: float, *, fraction: float = 1.0, skip: Tensor | None = None
) -> None:
    """Move gates by one common offset, so that the mean of their ``P(z != 0)`` is ``1 - progress``.

    With ``fraction < 1`` this holds for those that go, the ``ceil(fraction * n)`` gates with the
    lowest ``P(z != 0)``. One offset for *all* gates could only lower the mean: it would end
    with every gate between 0 and 1 instead of a share at 0 and the others at 1.

    At ``progress == 1`` the highest ``log_alpha`` of those that go is at most -8, and that of those
    that stay at least 8: every eval gate is then exactly 0 or 1, whatever the loss asks for.
    Nothing is moved at ``progress == 0``. No step synchronises with the device.

    Args:
        gates: gates with a ``log_alpha``, all on one device; they are changed in place.
        progress: from 0 (all at the source) to 1 (those that go are at the target).
        fraction: the share of gates that go, in (0, 1].
        skip: a scalar on the gates' device; where it is not 0, nothing is moved (the ``found_inf``
            of a GradScaler whose optimizer skips the step on the device).

    Example:
        >>> from transfer_surgery.gates import make_gate
        >>> gate = make_gate("hard_concrete", (1000,))
        >>> project([gate], 0.25)
        >>> round(gate.probability().mean().item(), 4)
        0.75
        >>> project([gate], 1.0, fraction=0.3)
        >>> int((gate.predict() == 0).sum()), int((gate.predict() == 1).sum())
        (300, 700)
    """
    if not gates or progress <= 0:
        return
    log_alphas = [gate.log_alpha.detach() for gate in gates]
    before = torch.cat([log_alpha.flatten() for log_alpha in log_alphas])
    logits = torch.cat([gate.logit().flatten() for gate in gates])

    number = before.numel()
    going = max(1, math.ceil(fraction * number - 1e-6))  # 0.1 * 30 is 3.0000000000000004
    at = slice(None) if going == number else logits.topk(going, largest=False, sorted=False).indices
    if progress < 1:
        after = before.clone()
        after[at] += _offset(logits[at], 1 - progress)
    else:
        after = before.clamp_min(_END)
        offset = (-_END - before[at].amax()).clamp_max(0)
        after[at] = (before[at] + offset).clamp_max(-_END)  # the clamp is for rounding
    if skip is not None:
        after = torch.where(skip.to(after.device) != 0, before, after)
    parts = torch.split(after, [log_alpha.numel() for log_alpha in log_alphas])
    for log_alpha, part in zip(log_alphas, parts, strict=True):
        log_alpha.copy_(part.view_as(log_alpha))


def _offset(logits: Tensor, budget: float) -> Tensor:
    """The number ``d`` with ``mean(sigmoid(logits + d)) == budget``, to 1e-4, on the device.

    Newton's method on ``logit(mean)``, which is nearly linear in ``d``. Its slope is never above 1
    (the mean of ``p * (1 - p)`` is at most ``m * (1 - m)``), so the root is at least as far away as
    the error: a lower bound for the bracket that catches Newton where gates are widely spread.
    """
    budget = min(max(budget, _MARGIN), 1 - _MARGIN)
    goal = math.log(budget / (1 - budget))
    low, high = goal - logits.amax(), goal - logits.amin()
    d = torch.zeros_like(low).clamp(low, high)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(logits + d)
        mean = p.mean()
        slope = mean - torch.dot(p, p) / p.numel()
        error = torch.logit(mean, eps=1e-6) - goal
        low = torch.where(error < 0, d - error, low)
        high = torch.where(error < 0, high, d - error)
        newton = d - error * mean * (1 - mean) / slope
        inside = (newton >= low) & (newton <= high)  # False for nan: no gate is between 0 and 1
        d = torch.where(inside, newton, (low + high) / 2)
    return d
