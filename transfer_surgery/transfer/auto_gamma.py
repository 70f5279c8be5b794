"""``gamma="auto"``: the weight of the structural risk follows a schedule, by dual ascent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.transfer.controllers import Group, Scheduled, moves
from transfer_surgery.transfer.projection import logit_of_budget
from transfer_surgery.transfer.risk import add_risk_gradient, risk_of
from transfer_surgery.units import GatedActivation

_MULTIPLIER = "transfer_multiplier"
"""Key of a parameter group: logarithm of the multiplier of ``gamma="auto"``."""

_DUAL_RATE = 0.1


class AutoGamma(Scheduled):
    """A gamma that follows the schedule: dual ascent on the constraint mean P(z != 0) <= budget.

    In log-odds ``c = logit(mean P(z != 0)) - logit(budget)``, which have a slope also where the
    risk has almost none, and in the logarithm of gamma, which has to be ten thousand times larger
    at the start than in the middle: ``log gamma = u + c - log(initial learning rate)``, and ``u``
    grows by ``c / 10`` after each step. (``c`` in ``u + c`` is the term of an augmented
    Lagrangian; with momentum the learning rate is that of many steps together.) Gates that went too
    far stay there, since the risk can only lower them. The optimizer decides how near to the
    budget that comes: see docs/controller.md.

    Args:
        sites: the units of the model, by path.
        schedule: the schedule; its order is "joint".
    """

    by_gradient = True

    def memory(self) -> dict[str, Any]:
        return {_MULTIPLIER: torch.zeros(())}

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
            group[_MULTIPLIER] = self._multiplier(group, mean) + growth
        self.warn_at_the_end(step)

    def _active(self, step: int) -> bool:
        return self.schedule.progress(step) > 0 and bool(self._moving())

    def _moving(self) -> list[GatedActivation]:
        return [unit for unit in self.units if moves(unit)]

    @torch.no_grad()
    def _excess(self, step: int) -> tuple[Tensor, Tensor]:
        """Mean of ``P(z != 0)``, and by how much its log-odds are above those of the budget."""
        mean = risk_of(self._moving(), "mean")
        goal = logit_of_budget(self.schedule.budget(step))
        return mean, (torch.logit(mean, eps=1e-5) - goal).clamp(-3, 3)

    @torch.no_grad()
    def _gamma(self, group: Group, step: int) -> Tensor:
        mean, excess = self._excess(step)
        momentum = group.get("momentum") or group.get("betas", (0.0,))[0]
        # Not the lr of the moment: what momentum keeps of a gradient is stepped with later ones.
        lr = group.get("initial_lr", group.get("lr"))
        if not isinstance(lr, Tensor):
            lr = lr or 1.0  # Adafactor may have None
        rate = lr / (1 - momentum)
        sign = -1 if group.get("maximize", False) else 1
        multiplier = torch.exp((self._multiplier(group, mean) + excess).clamp(-20, 20))
        gamma: Tensor = multiplier * (sign / rate)
        return gamma

    def _multiplier(self, group: Group, like: Tensor) -> Tensor:
        """On the device of the gates: a checkpoint may have been loaded on another one."""
        kept: Tensor = group[_MULTIPLIER]
        return kept.to(like.device)
