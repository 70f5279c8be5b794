"""What moves the gates: a constant gamma, or a schedule by projection.

`StepHooks` calls a controller around each optimizer step. What a controller has to remember is in
the gates' parameter group, so that it travels with the optimizer's state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from transfer_surgery._stacklevel import user_level
from transfer_surgery.transfer.order import in_order
from transfer_surgery.transfer.projection import project
from transfer_surgery.transfer.risk import add_risk_gradient, risk_of
from transfer_surgery.transfer.schedule import TransferSchedule, turns
from transfer_surgery.units import GatedActivation

Sites = Mapping[str, GatedActivation]
Group = dict[str, Any]


_SMALL_STEP = 0.01  # of the share of transferred gates

_TOO_FAR = 0.3  # share of the gates that no start of a training has transferred


class ScheduleEndedWarning(UserWarning):
    """The training runs for longer than its `TransferSchedule` was made for."""


class TransferRestartedWarning(UserWarning):
    """Gates that were transferred already are moved back, since the schedule begins anew."""


class Controller:
    """What is done to the gates around each optimizer step; by itself nothing.

    Args:
        sites: the units of the model, by path.
    """

    def __init__(self, sites: Sites) -> None:
        self.units = list(sites.values())

    def memory(self) -> dict[str, Any]:
        """What is kept in the gates' group, as it is at the start.

        It is there from the start, since some checkpoints fill only what they find.
        """
        return {}

    by_gradient = False
    """Whether gates move by their gradient alone, so that they can be frozen."""

    def needs_movement(self, step: int) -> bool:
        """Whether gates that stay where they are now are to be reported as frozen."""
        return False

    def add_gradient(self, group: Group, step: int, scale: Tensor | None) -> None:
        """Before the step: add the gradient of `loss`.

        Args:
            group: the gates' parameter group.
            step: the number of the step, from 1.
            scale: a GradScaler's loss scale, where the gradients are still scaled.
        """

    def loss(self, group: Group, step: int) -> Tensor | None:
        """What is added to the loss in that step; None: nothing."""
        return None

    def follow(self, group: Group, step: int, skipped: Tensor | None) -> None:
        """After the step: move what the gradient does not move.

        Args:
            group: the gates' parameter group.
            step: the number of the step, from 1.
            skipped: a scalar that is not 0 where the optimizer skipped this step on the device.
        """


class ConstantGamma(Controller):
    """The paper: ``gamma * structural_risk`` is added to the loss, Eq. 13.

    Args:
        sites: the units of the model, by path.
        gamma: the weight of the risk.
        warmup: steps over which it rises from 0.
        reduction: of the risk.
    """

    by_gradient = True

    def __init__(self, sites: Sites, gamma: float, warmup: int, reduction: str) -> None:
        super().__init__(sites)
        self.gamma, self.warmup, self.reduction = gamma, warmup, reduction

    def needs_movement(self, step: int) -> bool:
        return step > self.warmup

    def _weight(self, group: Group, step: int) -> float:
        sign = -1 if group.get("maximize", False) else 1
        return sign * self.gamma * min(1.0, step / max(self.warmup, 1))

    def add_gradient(self, group: Group, step: int, scale: Tensor | None) -> None:
        add_risk_gradient(self.units, self._weight(group, step), self.reduction, scale)

    def loss(self, group: Group, step: int) -> Tensor | None:
        return self._weight(group, step) * risk_of(self.units, self.reduction)


class Scheduled(Controller):
    """A controller that keeps to a `TransferSchedule`."""

    def __init__(self, sites: Sites, schedule: TransferSchedule) -> None:
        super().__init__(sites)
        self.schedule, self.warned = schedule, False

    def warn_at_the_end(self, step: int) -> None:
        """Once, where the training goes on after the schedule's last step."""
        if step <= self.schedule.total_steps or self.warned:
            return
        self.warned = True
        warnings.warn(
            f"step {step} of a TransferSchedule of {self.schedule.total_steps} steps: the gates "
            f"stay at the final budget, {1 - self.schedule.fraction:g}. total_steps counts "
            "optimizer steps, not epochs or accumulated batches: epochs * steps per epoch.",
            ScheduleEndedWarning,
            stacklevel=user_level(),
        )


class Projection(Scheduled):
    """After each step the gates are moved to the schedule's budget, see `project`.

    Args:
        sites: the units of the model, by path.
        schedule: the schedule.

    Raises:
        ValueError: its order does not fit the sites.
    """

    def __init__(self, sites: Sites, schedule: TransferSchedule) -> None:
        super().__init__(sites, schedule)
        self.groups = in_order(sites, schedule.order)
        self.begun = False
        self.last: list[float] = []

    def follow(self, group: Group, step: int, skipped: Tensor | None) -> None:
        progress = self.schedule.progress(step)
        if progress > 0:
            if not self.begun:
                self._warn_if_restarted(step, self.schedule.fraction * progress)
                self.begun = True
            self._project(progress, skipped)
        self.warn_at_the_end(step)

    def _warn_if_restarted(self, step: int, asked: float) -> None:
        """Once, before the first gate is moved: this look synchronises with the device."""
        learned = [u for u in self.units if u.gate.learned and moves(u)]
        if not learned:
            return
        gone = 1 - float(risk_of(learned, "mean").detach())
        if gone > asked + _TOO_FAR:
            warnings.warn(
                f"{gone:.0%} of the gates were transferred already, and the schedule, at step "
                f"{step}, asks for {asked:.0%}: they are moved back to their source. To go on with "
                "an earlier training load its optimizer's state after wrap_optimizer: the state "
                "holds the number of the step. To keep those gates set requires_grad=False.",
                TransferRestartedWarning,
                stacklevel=user_level(),
            )

    def _project(self, progress: float, skipped: Tensor | None) -> None:
        turns = self._turns(progress)
        last, self.last = self.last, [share for _, _, share in turns]
        for i, (units, fraction, share) in enumerate(turns):
            gates = [unit.gate for unit in units if unit.gate.learned]
            near = i < len(last) and last[i] > 0 and abs(share - last[i]) < _SMALL_STEP
            project(gates, share, fraction=fraction, skip=skipped, near=near)
            for unit in units:
                if not unit.gate.learned:
                    unit.gate.progress.fill_(share)

    def _turns(self, progress: float) -> list[tuple[list[GatedActivation], float, float]]:
        """For each group its units that are not frozen by the user, its fraction and progress.

        Frozen ones keep their place in the order: the others do not go earlier for it.
        """
        sizes = [sum(unit.gate.count for unit in units) for units in self.groups]
        shares = turns(sizes, self.schedule.fraction, progress)
        groups = [[unit for unit in units if moves(unit)] for units in self.groups]
        return [(units, *share) for units, share in zip(groups, shares, strict=True)]


def moves(unit: GatedActivation) -> bool:
    """Not frozen by the user."""
    return not unit.gate.learned or unit.log_alpha.requires_grad
