"""A warning about frozen gates: which sites gamma does not move, why, and what helps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from transfer_surgery._messages import user_stacklevel
from transfer_surgery._sharding import gathered
from transfer_surgery.units import GatedActivation

_WINDOW = 200
_STILL = 0.05  # of log_alpha; from 8, where the slope is least, it is about 4,000 steps to 0
_NOTHING = 0.1  # a gradient of this share of the decay's
_RESTING = 0.1  # a learning rate of this share of its highest: between the cycles of a schedule

_REASONS = {
    "lr": "the learning rate of the gates is 0",
    "eps": "their gradients are below the optimizer's eps, which shortens its steps",
    "decay": "they move by weight decay alone, which ends at log_alpha = 0",
    "slope": "the risk has almost no slope where they are (6.8e-5 per unit of gamma at 8)",
}


class FrozenGatesWarning(UserWarning):
    """Gates hardly move, or not because of the structural risk: they will not be transferred."""


class _Movement(NamedTuple):
    """The gates of one site that do not predict 0: means over a window, and their number."""

    change: float
    log_alpha: float
    gradient: float
    number: float


class FrozenWatch:
    """Looks at the gates once in 200 steps, and warns once. A look synchronises with the device.

    Args:
        sites: the units whose gates move by their gradient, by path.
    """

    def __init__(self, sites: Mapping[str, GatedActivation]) -> None:
        self.sites = {path: unit for path, unit in sites.items() if unit.gate.learned}
        self.is_watching = bool(self.sites)
        self.highest_rate = 0.0
        # Of the current window:
        self.steps = 0
        self.before: list[Tensor] = []
        self.rates: list[float] = []

    def start(self) -> None:
        """Before a step: where it is the first of a window, remember where the gates are."""
        if self.is_watching and self.steps == 0:
            self.before = [gathered(u.log_alpha.detach()).clone() for u in self.sites.values()]
            self.rates = []

    def is_due(self, rate: Any) -> bool:
        """After a step: take note of its rate, and say whether a window ends with it.

        Args:
            rate: the learning rate of the gates; one on a device is not looked at.
        """
        if not self.is_watching:
            return False
        if isinstance(rate, float | int):
            self.rates.append(float(rate))
            self.highest_rate = max(self.highest_rate, float(rate))
        self.steps = (self.steps + 1) % _WINDOW
        return self.steps == 0

    def look(self, optimizer: Optimizer) -> None:
        """At the end of a window: see which gates moved."""
        if 0 < sum(self.rates) < _RESTING * self.highest_rate * len(self.rates):
            return  # the end of a cycle: they will move again, or the training is over
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        frozen: dict[str, dict[str, _Movement]] = {}
        for (path, unit), movement in zip(self.sites.items(), self._movements(), strict=True):
            group = groups.get(id(unit.log_alpha))
            if group is None or not unit.log_alpha.requires_grad:
                continue  # frozen by the user
            if reason := _reason(movement, group):
                frozen.setdefault(reason, {})[path] = movement
        if frozen:
            self.is_watching, self.before, self.rates = False, [], []
            warnings.warn(_message(frozen), FrozenGatesWarning, stacklevel=user_stacklevel())

    @torch.no_grad()
    def _movements(self) -> list[_Movement]:
        rows = []
        for unit, before in zip(self.sites.values(), self.before, strict=True):
            now, grad = gathered(unit.log_alpha.detach()), unit.log_alpha.grad
            size = torch.zeros_like(now) if grad is None else gathered(grad).abs()
            change = (now - before.to(now.device)).abs()
            # Transferred gates drift far below: with them a mean would hide those that stay.
            kept = (unit.gate.predict() != 0).float()
            number = kept.sum()
            means = [(of * kept).sum() / number.clamp_min(1) for of in (change, now, size)]
            rows.append(torch.stack([*means, number]))
        # A model may be spread over several devices: gather on one of them first.
        return [_Movement(*r) for r in torch.stack([r.to(rows[0].device) for r in rows]).tolist()]


def _reason(movement: _Movement, group: Mapping[str, Any]) -> str | None:
    """Why these gates are frozen; None where they are not, or have been transferred."""
    if movement.number == 0:
        return None
    still = movement.change < _STILL
    if still and group.get("lr") is not None and float(group["lr"]) == 0:
        return "lr"
    eps = group.get("eps")  # Adafactor's is a pair, and means something else
    if isinstance(eps, float) and movement.gradient < eps:
        return "eps"
    # Decay that is not part of the gradient (AdamW, Lion) is small beside such an optimizer's step.
    coupled = not group.get("decoupled_weight_decay", "momentum" not in group)
    pull = group.get("weight_decay", 0.0) * abs(movement.log_alpha)
    if not still and coupled and movement.gradient < _NOTHING * pull:
        return "decay"
    return "slope" if still else None


def _message(frozen: Mapping[str, Mapping[str, _Movement]]) -> str:
    parts = []
    for reason, sites in frozen.items():
        change = max(movement.change for movement in sites.values())
        log_alpha = sum(movement.log_alpha for movement in sites.values()) / len(sites)
        more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
        parts.append(
            f"{_REASONS[reason]}: log_alpha changed by {change:.2g} at most and is {log_alpha:.2g} "
            f"(sites {', '.join(list(sites)[:3])}{more})"
        )
    return (
        f"the gates are frozen. In the last {_WINDOW} steps {'; '.join(parts)}. Use transfer="
        "TransferSchedule(total_steps), which moves gates whatever the optimizer does, or a larger "
        f"gamma, gate_lr or gate_weight_decay{' or a smaller eps' if 'eps' in frozen else ''}."
    )
