"""The two things that move gates: the gradient of the risk, or a projection onto a schedule.

`StepHooks` calls a `Risk` before each optimizer step, or a `Projection` after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transfer_surgery._messages import user_stacklevel
from transfer_surgery.transfer.projection import project
from transfer_surgery.transfer.risk import add_risk_gradient, risk_of
from transfer_surgery.transfer.schedule import TransferSchedule, groups_in_order, split_in_order
from transfer_surgery.units import GatedActivation

Group = dict[str, Any]

# A change of the share of transferred gates that counts as small: `project` then needs few steps.
_SMALL_STEP = 0.01

# Share of the gates that has to be transferred too early before a restart is suspected.
_TOO_FAR = 0.3


class ScheduleEndedWarning(UserWarning):
    """The training runs for longer than its `TransferSchedule` was made for."""


class TransferRestartedWarning(UserWarning):
    """Gates that were transferred already are moved back, since the schedule begins anew."""


@dataclass(frozen=True)
class Risk:
    """The paper's way: ``gamma * structural_risk`` is added to the loss, Eq. 13.

    Args:
        units: the units of the model.
        gamma: the weight of the risk.
        warmup: optimizer steps over which the weight rises from 0.
        reduction: the reduction of the risk.
    """

    units: list[GatedActivation]
    gamma: float
    warmup: int
    reduction: str

    def add_gradient(self, group: Group, step: int, scale: Tensor | None) -> None:
        """Add the gradient of `loss` to the gates.

        Args:
            group: the gates' parameter group.
            step: the number of the step, from 1.
            scale: a GradScaler's loss scale, where the gradients are still scaled.
        """
        add_risk_gradient(self.units, self._weight(group, step), self.reduction, scale)

    def loss(self, group: Group, step: int) -> Tensor:
        """What is added to the loss in that step."""
        return self._weight(group, step) * risk_of(self.units, self.reduction)

    def _weight(self, group: Group, step: int) -> float:
        sign = -1 if group.get("maximize", False) else 1
        return sign * self.gamma * min(1.0, step / max(self.warmup, 1))


class Projection:
    """After each step the gates are moved to the schedule's budget, see `project`.

    Args:
        sites: the units of the model, by path.
        schedule: the schedule.

    Raises:
        ValueError: its order does not fit the sites.
    """

    def __init__(self, sites: Mapping[str, GatedActivation], schedule: TransferSchedule) -> None:
        self.schedule = schedule
        self.groups = groups_in_order(sites, schedule.order)
        # The places of frozen units stay in the order: the others do not go earlier for them.
        self.sizes = [sum(unit.gate.count for unit in units) for units in self.groups]
        self.begun = False
        self.end_reported = False
        self.last: list[float] = []
        self.swapped: set[GatedActivation] = set()
        """Units whose gates `swap_targets` moved since the last step."""

    def follow(self, step: int, skipped: Tensor | None) -> None:
        """Move the gates to the budget of a step.

        Args:
            step: the number of the step, from 1.
            skipped: a scalar that is not 0 where the optimizer skipped this step on the device.
        """
        progress = self.schedule.progress(step)
        if progress > 0:
            if not self.begun:
                self._warn_if_restarted(step, self.schedule.fraction * progress)
                self.begun = True
            swapped = {unit: unit.gate.predict() for unit in self.swapped}
            self._project(progress, skipped)
            if swapped and not (skipped is not None and bool(skipped)):
                self.swapped.clear()
                self._warn_if_undone(step, swapped)
        if step > self.schedule.total_steps and not self.end_reported:
            self.end_reported = True
            self._warn_of_the_end(step)

    def _project(self, progress: float, skipped: Tensor | None) -> None:
        shares = split_in_order(self.sizes, self.schedule.fraction, progress)
        last, self.last = self.last, [share for _, share in shares]
        for i, (units, (fraction, share)) in enumerate(zip(self.groups, shares, strict=True)):
            moved = [unit.gate for unit in units if is_moved(unit)]
            near = i < len(last) and last[i] > 0 and abs(share - last[i]) < _SMALL_STEP
            learned = [gate for gate in moved if gate.learned]
            project(learned, share, fraction=fraction, skip=skipped, near=near)
            for gate in moved:
                if not gate.learned:
                    gate.progress.fill_(share)

    def _warn_if_restarted(self, step: int, asked: float) -> None:
        """Warn once, before the first gate is moved: this look synchronises with the device."""
        units = [unit for units in self.groups for unit in units]
        learned = [unit for unit in units if unit.gate.learned and is_moved(unit)]
        if not learned:
            return
        transferred = 1 - float(risk_of(learned, "mean").detach())
        if transferred > asked + _TOO_FAR:
            warnings.warn(
                f"{transferred:.0%} of the gates were transferred already, and the schedule asks "
                f"for {asked:.0%} at step {step}: the gates are moved back to their source. To "
                "continue an earlier training, load its optimizer's state after wrap_optimizer: "
                "the state holds the number of the step. To keep those gates where they are, set "
                "requires_grad=False on their log_alpha.",
                TransferRestartedWarning,
                stacklevel=user_stacklevel(),
            )

    def _warn_if_undone(self, step: int, swapped: Mapping[GatedActivation, Tensor]) -> None:
        """Warn where a step moved gates that `swap_targets` had moved before it."""
        moved = [u for u, before in swapped.items() if not torch.equal(u.gate.predict(), before)]
        if moved:
            paths = sorted(unit.path for unit in moved)
            warnings.warn(
                f"swap_targets moved the gates at {', '.join(paths[:3])}"
                f"{', ...' if len(paths) > 3 else ''}, and the TransferSchedule of the optimizer "
                f"has moved them to what it asks for at step {step}, which is "
                f"{1 - self.schedule.budget(step):.0%} of the gates transferred. To swap them for "
                "good, set requires_grad=False on their log_alpha and call swap_targets again; "
                "gates without a log_alpha need a new optimizer that is wrapped without "
                "transfer=.",
                TransferRestartedWarning,
                stacklevel=user_stacklevel(),
            )

    def _warn_of_the_end(self, step: int) -> None:
        warnings.warn(
            f"step {step} of a TransferSchedule of {self.schedule.total_steps} steps: the gates "
            f"stay at the final budget, {1 - self.schedule.fraction:g}. total_steps counts "
            "optimizer steps, not epochs or accumulated batches: epochs * steps per epoch.",
            ScheduleEndedWarning,
            stacklevel=user_stacklevel(),
        )


def is_moved(unit: GatedActivation) -> bool:
    """Whether the gates of a unit move: the user did not freeze them."""
    return not unit.gate.learned or unit.log_alpha.requires_grad
