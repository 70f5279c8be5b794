"""What happens around each step of a wrapped optimizer, see `wrap_optimizer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery.risk import add_risk_gradient, risk_of
from transfer_surgery.schedule import TransferSchedule, project
from transfer_surgery.unit import gated_activations

__all__ = ["STEP", "FrozenGatesWarning", "ScheduleEndedWarning", "StepHooks"]

STEP = "transfer_step"
"""Key of a parameter group: optimizer steps since the start of the transfer."""

_LOOK_EVERY = 50  # steps between looks at a device other than the CPU: a look synchronises
_FROZEN_STEPS = 200
_FROZEN_CHANGE = 0.05

Closure = Callable[[], Any]


class FrozenGatesWarning(UserWarning):
    """The gates hardly move: they sit where the structural risk has almost no slope."""


class ScheduleEndedWarning(UserWarning):
    """The training runs for longer than its `TransferSchedule` was made for."""


class StepHooks:
    """The two hooks of one optimizer.

    Args:
        optimizer: the optimizer; not kept.
        model: its model; the gated activations and the names of parameters are kept.
        gamma: weight of the structural risk, or None.
        transfer: the schedule, or None; exactly one of the two is given.
        reduction: of the risk.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        gamma: float | None,
        transfer: TransferSchedule | None,
        reduction: str,
    ) -> None:
        self.sites = dict(gated_activations(model))
        self.units = list(self.sites.values())
        self.gamma, self.transfer, self.reduction = gamma, transfer, reduction
        self.watched = _watched(optimizer, model)
        self.steps = 0
        self.first_log_alpha: Tensor | None = None
        self.warned = False

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the risk's gradient now, or in the closure after each evaluation of it."""
        if self.gamma is not None and self.steps == 0:
            self.first_log_alpha = self._log_alpha()
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": self._with_risk(kwargs["closure"], optimizer)}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._with_risk(args[1], optimizer), *args[2:]), kwargs
        self._check_finite(optimizer, "nothing was updated")
        self._add_risk(optimizer)
        return None

    def after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the step; move the gates along the schedule, or see whether they move at all."""
        group = _group(optimizer)
        step = group[STEP] = group.get(STEP, 0) + 1
        self.steps += 1
        if self.transfer is not None:
            self._follow(self.transfer, step, getattr(optimizer, "found_inf", None))
        elif self.steps == _FROZEN_STEPS:
            self._warn_if_frozen()

    def _with_risk(self, closure: Closure, optimizer: Optimizer) -> Closure:
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            loss = closure()
            evaluations += 1
            trial = f"evaluation {evaluations} of the closure, the weights are those of a trial"
            self._check_finite(optimizer, trial if evaluations > 1 else "nothing was updated")
            self._add_risk(optimizer)
            if loss is None or self.gamma is None:
                return loss
            with torch.no_grad():
                risk = self._sign(optimizer) * self.gamma * risk_of(self.units, self.reduction)
            return loss + (risk.to(loss.device) if isinstance(loss, Tensor) else risk.item())

        return evaluate

    def _add_risk(self, optimizer: Optimizer) -> None:
        if self.gamma is not None:
            gamma = self._sign(optimizer) * self.gamma
            # Fused optimizers unscale inside `step`; others are unscaled by now.
            scale = getattr(optimizer, "grad_scale", None)
            add_risk_gradient(self.units, gamma, self.reduction, scale)

    def _sign(self, optimizer: Optimizer) -> int:
        return -1 if _group(optimizer).get("maximize", False) else 1

    def _check_finite(self, optimizer: Optimizer, state: str) -> None:
        """Raise FloatingPointError where a gradient is not finite."""
        if getattr(optimizer, "found_inf", None) is not None:  # a GradScaler skips the step itself
            return
        found = [(n, p.grad) for n, p in self.watched if p.grad is not None and p.grad.numel()]
        on_cpu = all(grad.device.type == "cpu" for _, grad in found)
        if not found or not (on_cpu or self.steps % _LOOK_EVERY == 0):
            return
        # The largest element rather than a sum of squares, which overflows where no element does.
        norms = torch._foreach_norm([grad for _, grad in found], math.inf)
        finite = torch.stack([norm.isfinite().to(norms[0].device) for norm in norms])
        if bool(finite.all()):
            return
        if not on_cpu and self.steps:
            state = f"the last look was {_LOOK_EVERY} steps ago: go back to a checkpoint before it"
        name = found[finite.tolist().index(False)][0]
        step = _group(optimizer).get(STEP, 0) + 1
        raise FloatingPointError(
            f"optimizer step {step}: the gradient of {name} is not finite ({state}). Lower the "
            "learning rate or clip gradients, use a GradScaler with float16, lower gamma, or give "
            "the TransferSchedule more steps."
        )

    def _follow(self, transfer: TransferSchedule, step: int, found_inf: Tensor | None) -> None:
        progress = transfer.progress(step)
        learned = [u.gate for u in self.units if u.gate.learned and u.log_alpha.requires_grad]
        project(learned, progress, fraction=transfer.fraction, skip=found_inf)
        for unit in self.units:
            if not unit.gate.learned:
                unit.gate.progress.fill_(progress)
        if step > transfer.total_steps and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {step} of a TransferSchedule of {transfer.total_steps} steps: the gates "
                f"stay at the final budget, {1 - transfer.fraction:g}. total_steps counts "
                "optimizer steps, not epochs or accumulated batches: epochs * steps per epoch.",
                ScheduleEndedWarning,
                stacklevel=4,
            )

    def _log_alpha(self) -> Tensor:
        learned = [unit.log_alpha.detach().flatten() for unit in self.units if unit.gate.learned]
        return torch.cat([log_alpha.to(learned[0].device) for log_alpha in learned])

    def _warn_if_frozen(self) -> None:
        assert self.first_log_alpha is not None
        now = self._log_alpha()
        change, mean = torch.stack([(now - self.first_log_alpha).abs().mean(), now.mean()]).tolist()
        self.first_log_alpha = None
        if change >= _FROZEN_CHANGE or mean < 0:  # below 0 they have been transferred
            return
        sites = [path for path, unit in self.sites.items() if unit.gate.learned]
        more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
        warnings.warn(
            f"the gates are frozen: in {_FROZEN_STEPS} steps log_alpha changed by {change:.2g} on "
            f"average, and is {mean:.2g} (sites {', '.join(sites[:3])}{more}). The risk's slope is "
            f"gamma * 6.8e-5 at log_alpha = 8, and gamma is {self.gamma:g}. Use transfer="
            "TransferSchedule(total_steps), or a larger gamma, gate_lr or gate_weight_decay.",
            FrozenGatesWarning,
            stacklevel=4,
        )


def _group(optimizer: Optimizer) -> dict[str, Any]:
    """The gates' group. Looked up each time: `load_state_dict` replaces the groups."""
    groups = optimizer.param_groups
    return next((group for group in groups if STEP in group), groups[0])


def _watched(optimizer: Optimizer, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that a loss which is not finite reaches: biases and norms, and the gates."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ours = [(name, p) for name, p in model.named_parameters() if id(p) in held]
    gates = {id(u.log_alpha) for _, u in gated_activations(model) if u.gate.learned}
    vectors = [(name, p) for name, p in ours if p.dim() <= 1 and id(p) not in gates]
    if not vectors:
        return ours
    return [(name, p) for name, p in ours if p.dim() <= 1 or id(p) in gates]
