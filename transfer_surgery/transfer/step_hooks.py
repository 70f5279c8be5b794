"""What happens around each step of a wrapped optimizer, see `wrap_optimizer`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery._sharding import anywhere, is_fsdp, local, reshard
from transfer_surgery.transfer.controllers import Controller
from transfer_surgery.transfer.frozen_gates import FrozenWatch
from transfer_surgery.transfer.nonfinite import FiniteWatch
from transfer_surgery.units import gated_activations

STEP = "transfer_step"
"""Key of a parameter group: optimizer steps since the start of the transfer, without pauses."""

PAUSED = "transfer_paused"
"""Key of a parameter group: whether the schedule's clock stands still."""

Closure = Callable[[], Any]


class StepHooks:
    """The two hooks of one optimizer.

    Args:
        optimizer: the optimizer; not kept.
        model: its model; the gated activations and the names of parameters are kept.
        controller: what moves the gates.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, controller: Controller) -> None:
        self.controller = controller
        self.finite = FiniteWatch(optimizer, model)
        units = dict(gated_activations(model))
        self.frozen = FrozenWatch(units if controller.by_gradient else {})
        self.plain = {path: unit for path, unit in units.items() if unit.fitted is None}
        self.sharded = [module for module in model.modules() if is_fsdp(module)]
        self.empty = False

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the risk's gradient now, or in the closure after each evaluation of it."""
        if _is_nested(optimizer):
            return None
        _refuse_capture()
        self._refuse_new_targets()
        reshard(self.sharded)
        self.frozen.start(gates_group(optimizer).get("lr"))
        self.empty = False
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": self._with_risk(kwargs["closure"], optimizer)}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._with_risk(args[1], optimizer), *args[2:]), kwargs
        self.empty = _is_empty(optimizer)
        if not self.empty:
            self._check_finite(optimizer, "nothing was updated")
            self._add_gradient(optimizer)
        return None

    def after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the step; let the controller move the gates, and see whether they move at all."""
        if self.empty or _is_nested(optimizer):
            return
        reshard(self.sharded)  # a closure may have run the model
        group, step = gates_group(optimizer), _next_step(optimizer)
        group[STEP] = step
        self.controller.follow(group, step, getattr(optimizer, "found_inf", None))
        if self.frozen.is_due() and self.controller.needs_movement(step):
            self.frozen.look(optimizer)

    def _refuse_new_targets(self) -> None:
        """Targets that were matched, or loaded, since then have parameters that nobody trains."""
        new = [path for path, unit in self.plain.items() if unit.fitted is not None]
        if new:
            names = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
            raise RuntimeError(
                f"{names}: matched since the optimizer "
                "was wrapped, which does not know the parameters of these targets: call "
                "match_targets or load_state_dict first, then make and wrap the optimizer."
            )

    def _with_risk(self, closure: Closure, optimizer: Optimizer) -> Closure:
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            loss = closure()
            evaluations += 1
            trial = f"evaluation {evaluations} of the closure, the weights are those of a trial"
            self._check_finite(optimizer, trial if evaluations > 1 else "nothing was updated")
            self._add_gradient(optimizer)
            if loss is None:
                return loss
            with torch.no_grad():
                risk = self.controller.loss(gates_group(optimizer), _next_step(optimizer))
            if risk is None:
                return loss
            return loss + (risk.to(loss.device) if isinstance(loss, Tensor) else risk.item())

        return evaluate

    def _add_gradient(self, optimizer: Optimizer) -> None:
        # Fused optimizers unscale inside `step`; others are unscaled by now.
        scale = getattr(optimizer, "grad_scale", None)
        self.controller.add_gradient(gates_group(optimizer), _next_step(optimizer), scale)

    def _check_finite(self, optimizer: Optimizer, state: str) -> None:
        if getattr(optimizer, "found_inf", None) is None:  # a GradScaler skips the step itself
            self.finite.check(_next_step(optimizer), state)


def gates_group(optimizer: Optimizer) -> dict[str, Any]:
    """The gates' group. Looked up each time: `load_state_dict` replaces the groups."""
    groups = optimizer.param_groups
    return next((group for group in groups if STEP in group), groups[0])


def _next_step(optimizer: Optimizer) -> int:
    """The number of the step being taken, from 1; in a pause that of the step before."""
    group = gates_group(optimizer)
    return int(group.get(STEP, 0)) + (not group.get(PAUSED, False))


# What torch makes of every `step` to run its hooks.
_STEP_CODE = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether another ``step`` of the same optimizer calls this one, by ``super().step()``."""
    calls, frame = 0, sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        calls += frame.f_code is _STEP_CODE and frame.f_locals.get("self") is optimizer
    return calls > 1


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph: a replay would not run the hooks "
            "that move the gates. Capture forward and backward only, and call step() outside."
        )


def _is_empty(optimizer: Optimizer) -> bool:
    """Whether this is no step of a training, but one that only creates the optimizer's state.

    `torch.distributed.checkpoint` takes such a step, with zero gradients and learning rates of 0.
    """
    groups = optimizer.param_groups
    if not all(_is_zero(group.get("lr", 1.0)) for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not anywhere(any(bool(local(g).any()) for g in grads), grads)


def _is_zero(lr: float | Tensor) -> bool:
    if isinstance(lr, Tensor):  # one on a GPU is the user's own: not looked at, not DCP's
        return lr.device.type == "cpu" and float(lr) == 0
    return lr == 0
