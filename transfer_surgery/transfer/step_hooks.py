"""What happens around each step of a wrapped optimizer, see `wrap_optimizer`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery._messages import user_stacklevel
from transfer_surgery._sharding import any_rank, is_fsdp, local, reshard
from transfer_surgery.transfer.controllers import Projection, Risk
from transfer_surgery.transfer.frozen_gates import FrozenWatch
from transfer_surgery.transfer.nonfinite import FiniteWatch
from transfer_surgery.transfer.param_groups import PAUSED, STEP, gates_group, next_step
from transfer_surgery.transfer.skipped_steps import SkippedSteps
from transfer_surgery.units import GatedActivation

Closure = Callable[[], Any]


class StepHooks:
    """The hooks of one optimizer.

    Args:
        optimizer: the optimizer; not kept.
        model: its model.
        sites: the units of the model, by path.
        controller: what moves the gates.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        sites: Mapping[str, GatedActivation],
        controller: Risk | Projection,
    ) -> None:
        self.model = model
        self.risk = controller if isinstance(controller, Risk) else None
        self.projection = controller if isinstance(controller, Projection) else None
        self.units = dict(sites)
        self.without_fit = [path for path, unit in self.units.items() if unit.fitted is None]
        self.places = [
            (parent, name)
            for parent in model.modules()
            for name, unit in parent._modules.items()
            if isinstance(unit, GatedActivation)
        ]
        self.there = self._at_places()
        self.finite = FiniteWatch(optimizer, model, self.units.values())
        self.frozen = FrozenWatch(self.units if self.risk is not None else {})
        self.skipped = SkippedSteps()
        self.sharded = [module for module in model.modules() if is_fsdp(module)]
        self.is_off = False
        self.is_retired = False
        """Whether another optimizer moves these gates now."""
        self.retirement_reported = self.out_reported = False

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the risk's gradient now, or in the closure after each evaluation of it."""
        if _is_nested(optimizer):
            return None
        # See whether there is anything to do.
        _check_no_capture()
        self._check_units()
        self.is_off = self.is_retired or not self.units
        if self.is_off:
            self._warn_if_retired()
            return None
        reshard(self.sharded)
        self.count_skipped(optimizer)
        self.frozen.start()
        # With a closure there are no gradients yet.
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": self._with_risk(kwargs["closure"], optimizer)}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._with_risk(args[1], optimizer), *args[2:]), kwargs
        self.is_off = _is_empty(optimizer)
        if not self.is_off:
            self._check_finite(optimizer, "nothing was updated")
            self._add_gradient(optimizer)
        return None

    def after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the step, move the gates along a schedule, and see whether they move at all."""
        if self.is_off or _is_nested(optimizer):
            return
        reshard(self.sharded)  # a closure may have run the model
        # A fused optimizer says on the device whether it skipped the step.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if bool(found_inf):
                return
            found_inf = None
        group, step = gates_group(optimizer), next_step(optimizer)
        if found_inf is not None and not group.get(PAUSED, False):
            self.skipped.add(found_inf)
        group[STEP] = step
        if self.projection is not None:
            self.projection.follow(step, found_inf)
        due = self.frozen.is_due(group.get("lr"))
        if due and self.risk is not None and step > self.risk.warmup:
            self.frozen.look(optimizer)

    def count_skipped(self, optimizer: Optimizer, wait: bool = False) -> None:
        """Subtract skipped steps from the count.

        Args:
            optimizer: the wrapped optimizer.
            wait: subtract also those that the host does not know yet.
        """
        group = gates_group(optimizer)
        if STEP in group:
            group[STEP] -= self.skipped.take(wait)

    def _check_units(self) -> None:
        """Refuse units that came into the model since: nobody would move their gates."""
        new = [path for path in self.without_fit if self.units[path].fitted is not None]
        if new:
            names = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
            raise RuntimeError(
                f"{names}: fitted since the optimizer was wrapped, which does not know the "
                "parameters of these targets: call match_targets or load_state_dict first, then "
                "make and wrap the optimizer."
            )
        now = self._at_places()
        if now == self.there:
            self._warn_if_out()
            return
        # Units are gone. The weights may train on, unless new units took their place.
        present = [unit for unit in self.model.modules() if isinstance(unit, GatedActivation)]
        known = {id(unit) for unit in self.units.values()}
        if any(id(unit) not in known for unit in present):
            raise RuntimeError(
                "the model was converted again since this optimizer was wrapped, and its new gates "
                "would never move. Make a new optimizer and call wrap_optimizer on it."
            )
        self.there = now
        if not present:
            self.units, self.without_fit = {}, []

    def _warn_if_out(self) -> None:
        """A slice of a Sequential is a module of its own, which surgery on the whole leaves."""
        out = [path for path, unit in self.units.items() if unit.is_out]
        if out and not self.out_reported:
            self.out_reported = True
            warnings.warn(
                f"the gates at {', '.join(out[:3])}{', ...' if len(out) > 3 else ''} have been "
                "taken out of their network since this optimizer was wrapped. If the network was "
                "converted again, make a new optimizer and call wrap_optimizer on it; otherwise "
                "the new gates never move.",
                stacklevel=user_stacklevel(),
            )

    def _at_places(self) -> list[nn.Module | None]:
        """What is where the units were when the optimizer was wrapped."""
        return [parent._modules.get(name) for parent, name in self.places]

    def _warn_if_retired(self) -> None:
        if self.is_retired and not self.retirement_reported:
            self.retirement_reported = True
            warnings.warn(
                "another optimizer was wrapped for the same gates since, and moves them now: this "
                "one trains its parameters only.",
                stacklevel=user_stacklevel(),
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
            if loss is None or self.risk is None:
                return loss
            with torch.no_grad():
                risk = self.risk.loss(gates_group(optimizer), next_step(optimizer))
            return loss + (risk.to(loss.device) if isinstance(loss, Tensor) else risk.item())

        return evaluate

    def _add_gradient(self, optimizer: Optimizer) -> None:
        if self.risk is not None:
            # Fused optimizers unscale inside `step`; others are unscaled by now.
            scale = getattr(optimizer, "grad_scale", None)
            self.risk.add_gradient(gates_group(optimizer), next_step(optimizer), scale)

    def _check_finite(self, optimizer: Optimizer, state: str) -> None:
        if getattr(optimizer, "found_inf", None) is None:  # a GradScaler skips the step itself
            self.finite.check(next_step(optimizer), state)


# What torch makes of every `step` to run its hooks.
_STEP_CODE = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether another ``step`` of the same optimizer calls this one, by ``super().step()``."""
    calls, frame = 0, sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        calls += frame.f_code is _STEP_CODE and frame.f_locals.get("self") is optimizer
    return calls > 1


def _check_no_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph: a replay would not run the hooks "
            "that move the gates. Capture forward and backward only, and call step() outside."
        )


def _is_empty(optimizer: Optimizer) -> bool:
    """Whether this step only creates the optimizer's state.

    `torch.distributed.checkpoint` takes such a step, with zero gradients and learning rates of 0.
    """
    groups = optimizer.param_groups
    if not all(_is_zero(group.get("lr", 1.0)) for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any_rank(any(bool(local(g).any()) for g in grads), grads)


def _is_zero(lr: float | Tensor) -> bool:
    if isinstance(lr, Tensor):  # DCP's is on the CPU; one on a GPU is not read
        return lr.device.type == "cpu" and float(lr) == 0
    return lr == 0
