"""What moves the gates: a constant gamma, a schedule by projection, or a gamma that follows one.

`StepHooks` calls a controller around each optimizer step. What a controller has to remember is in
the gates' parameter group, so that it travels with the optimizer's state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.order import in_order
from transfer_surgery.projection import logit_of_budget, project
from transfer_surgery.risk import add_risk_gradient, risk_of
from transfer_surgery.schedule import TransferSchedule, turns
from transfer_surgery.unit import GatedActivation

__all__ = ["MULTIPLIER", "AutoGamma", "ConstantGamma", "Controller", "Projection"]

MULTIPLIER = "transfer_multiplier"
"""Key of a parameter group: logarithm of the multiplier of ``gamma="auto"``."""

Sites = Mapping[str, GatedActivation]
Group = dict[str, Any]


class ScheduleEndedWarning(UserWarning):
    """The training runs for longer than its `TransferSchedule` was made for."""


class Controller:
    """What is done to the gates around each optimizer step; by itself nothing.

    Args:
        sites: the units of the model, by path.
    """

    def __init__(self, sites: Sites) -> None:
        self.units = list(sites.values())

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


class _Scheduled(Controller):
    """A controller that keeps to a `TransferSchedule`."""

    def __init__(self, sites: Sites, schedule: TransferSchedule) -> None:
        super().__init__(sites)
        self.schedule, self.warned = schedule, False

    def _warn_at_the_end(self, step: int) -> None:
        if step <= self.schedule.total_steps or self.warned:
            return
        self.warned = True
        warnings.warn(
            f"step {step} of a TransferSchedule of {self.schedule.total_steps} steps: the gates "
            f"stay at the final budget, {1 - self.schedule.fraction:g}. total_steps counts "
            "optimizer steps, not epochs or accumulated batches: epochs * steps per epoch.",
            ScheduleEndedWarning,
            stacklevel=5,
        )


class Projection(_Scheduled):
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

    def follow(self, group: Group, step: int, skipped: Tensor | None) -> None:
        progress = self.schedule.progress(step)
        if progress > 0:
            self._project(progress, skipped)
        self._warn_at_the_end(step)

    def _project(self, progress: float, skipped: Tensor | None) -> None:
        for units, fraction, share in self._turns(progress):
            gates = [unit.gate for unit in units if unit.gate.learned]
            project(gates, share, fraction=fraction, skip=skipped)
            for unit in units:
                if not unit.gate.learned:
                    unit.gate.progress.fill_(share)

    def _turns(self, progress: float) -> list[tuple[list[GatedActivation], float, float]]:
        """For each group of units that are not frozen by the user: its fraction and progress."""
        groups = [[unit for unit in units if _moves(unit)] for units in self.groups]
        groups = [units for units in groups if units]
        sizes = [sum(unit.gate.count for unit in units) for units in groups]
        shares = turns(sizes, self.schedule.fraction, progress)
        return [(units, *share) for units, share in zip(groups, shares, strict=True)]


class AutoGamma(_Scheduled):
    """A gamma that follows the schedule: dual ascent on the constraint mean P(z != 0) <= budget.

    In log-odds ``c = logit(mean P(z != 0)) - logit(budget)``, which have a slope also where the
    risk has almost none, and in the logarithm of gamma, which has to be ten thousand times larger
    at the start than in the middle: ``log gamma = u + c - log(learning rate)``, and ``u`` grows by
    ``c / 10`` after each step. (``c`` in ``u + c`` is the term of an augmented Lagrangian; with
    momentum the learning rate is that of many steps together.) Gates that went too far stay there,
    since the risk can only lower them. The optimizer decides how near to the budget that comes:
    see docs/controller.md.

    Args:
        sites: the units of the model, by path.
        schedule: the schedule; its order is "joint".
    """

    def needs_movement(self, step: int) -> bool:
        if not self._active(step):
            return False
        mean, _ = self._excess(step)
        return float(mean) > self.schedule.budget(step) + 0.1

    def add_gradient(self, group: Group, step: int, scale: Tensor | None) -> None:
        if self._active(step):
            add_risk_gradient(self.units, self._gamma(group, step), "sum", scale)

    def loss(self, group: Group, step: int) -> Tensor | None:
        return self._gamma(group, step) * risk_of(self.units, "sum") if self._active(step) else None

    @torch.no_grad()
    def follow(self, group: Group, step: int, skipped: Tensor | None) -> None:
        if self._active(step):
            mean, excess = self._excess(step)
            growth = _DUAL_RATE * excess
            if skipped is not None:
                growth = torch.where(skipped.to(growth.device) != 0, 0.0, growth)
            group[MULTIPLIER] = self._multiplier(group, mean) + growth
        self._warn_at_the_end(step)

    def _active(self, step: int) -> bool:
        return self.schedule.progress(step) > 0 and bool(self._moving())

    def _moving(self) -> list[GatedActivation]:
        return [unit for unit in self.units if _moves(unit)]

    @torch.no_grad()
    def _excess(self, step: int) -> tuple[Tensor, Tensor]:
        """Mean of ``P(z != 0)``, and by how much its log-odds are above those of the budget."""
        units = self._moving()
        device = units[0].log_alpha.device
        mean = torch.cat([u.gate.probability().flatten().to(device) for u in units]).mean()
        goal = logit_of_budget(self.schedule.budget(step))
        return mean, (torch.logit(mean, eps=1e-5) - goal).clamp(-3, 3)

    @torch.no_grad()
    def _gamma(self, group: Group, step: int) -> Tensor:
        mean, excess = self._excess(step)
        momentum = group.get("momentum") or group.get("betas", (0.0,))[0]
        rate = group.get("lr", 1.0) / (1 - momentum) + 1e-8
        sign = -1 if group.get("maximize", False) else 1
        multiplier = torch.exp((self._multiplier(group, mean) + excess).clamp(-20, 20))
        gamma: Tensor = multiplier * (sign / rate)
        return gamma

    def _multiplier(self, group: Group, like: Tensor) -> Tensor:
        """On the device of the gates: a checkpoint may have been loaded on another one."""
        return torch.as_tensor(group.get(MULTIPLIER, 0.0), dtype=like.dtype, device=like.device)


_DUAL_RATE = 0.1


def _moves(unit: GatedActivation) -> bool:
    """Not frozen by the user."""
    return not unit.gate.learned or unit.log_alpha.requires_grad
