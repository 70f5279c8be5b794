"""Where an optimizer holds the gates: in a parameter group of their own, if it can have one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Muon, Optimizer

from transfer_surgery.hooks import STEP
from transfer_surgery.unit import GatedActivation

__all__ = ["check_settings", "hold_gates"]


def check_settings(settings: Mapping[str, float], optimizer: Optimizer, learned: bool) -> None:
    """Raise ValueError where the optimizer cannot hold gates, or not with these settings."""
    # It checks its parameters when it is built only, and would fail at the first step.
    if learned and isinstance(optimizer, Muon):
        raise ValueError(
            "torch.optim.Muon updates matrices as a whole, and gates are none: hold them, like "
            "biases, in a second optimizer such as AdamW, and wrap that one."
        )
    for key, value in settings.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"gate_{key}={value}: give a finite number that is not negative.")
        if isinstance(optimizer, LBFGS):
            raise ValueError(f"gate_{key}: LBFGS allows only one parameter group. Leave it out.")
        if not learned:
            raise ValueError(f"gate_{key}: these gates have no parameters. Leave it out.")
        if key not in optimizer.defaults:
            raise ValueError(f"gate_{key}: {type(optimizer).__name__} has no {key}. Leave it out.")


def hold_gates(
    optimizer: Optimizer,
    inner: Optimizer,
    model: nn.Module,
    units: Sequence[GatedActivation],
    settings: Mapping[str, float],
    **defaults: float,
) -> None:
    """Make the optimizer hold the gates, and mark the group with the count of steps.

    Args:
        optimizer: as the user has it.
        inner: the optimizer inside that updates the parameters, or the same.
        model: the converted model.
        units: its units whose gates are learned.
        settings: of the gates' group, checked by `check_settings`.
        defaults: further settings of a new group, where its optimizer has such.

    Raises:
        ValueError: a scheduler knows the groups already, and the gates need one.
    """
    if not units:
        inner.param_groups[0].setdefault(STEP, 0)
    elif isinstance(inner, LBFGS):
        _join_only_group(inner, units)
    elif earlier := next((g for g in inner.param_groups if STEP in g), None):
        earlier.update(settings)  # a copy of a wrapped optimizer
    elif any("initial_lr" in group for group in inner.param_groups):
        _leave_in_place(inner.param_groups, {unit.log_alpha for unit in units}, settings)
    else:
        gates = {unit.log_alpha for unit in units}
        own = {key: value for key, value in defaults.items() if key in inner.defaults}
        _move_to_own_group(optimizer, inner, model, gates, own | dict(settings))


def _join_only_group(optimizer: LBFGS, units: Sequence[GatedActivation]) -> None:
    group = optimizer.param_groups[0]
    held = {id(p) for p in group["params"]}
    new = [unit.log_alpha for unit in units if id(unit.log_alpha) not in held]
    if new:
        group["params"].extend(new)  # in place: LBFGS keeps a reference to this very list
        optimizer._numel_cache = None
        optimizer.state.clear()  # its curvature history has the old number of parameters
    group.setdefault(STEP, 0)


def _move_to_own_group(
    optimizer: Optimizer,
    inner: Optimizer,
    model: nn.Module,
    gates: set[nn.Parameter],
    settings: dict[str, float],
) -> None:
    groups = inner.param_groups
    named = "param_names" in groups[0]
    own: dict[str, Any] = {"lr": _copy(groups[0]["lr"]), STEP: 0}
    own["params"] = [(n, p) if named else p for n, p in model.named_parameters() if p in gates]
    for group in groups:
        stay = [i for i, p in enumerate(group["params"]) if p not in gates]
        for key in ("params", "param_names") if named else ("params",):
            group[key] = [group[key][i] for i in stay]
    # Of the outer optimizer, which may want settings of its own in each group.
    optimizer.add_param_group(own | settings)


def _leave_in_place(
    groups: list[dict[str, Any]], gates: set[nn.Parameter], settings: Mapping[str, float]
) -> None:
    """A learning-rate scheduler knows the groups that there are: it must not find another one."""
    held = {p for group in groups for p in group["params"]}
    if settings or not gates <= held:
        wrong = f"gate_{next(iter(settings))} needs" if settings else "the gates need"
        raise ValueError(
            "a learning-rate scheduler was created for this optimizer: it would not know the group "
            f"that {wrong}. Create it after wrap_optimizer, or build the optimizer from the "
            "converted model's parameters: gates then stay in the group they are in. (If the "
            "scheduler is no longer in use, delete 'initial_lr' from optimizer.param_groups first.)"
        )
    holding = [g for g in groups if any(p in gates for p in g["params"])]
    holding[0].setdefault(STEP, 0)


def _copy(lr: float | Tensor) -> float | Tensor:
    """The same value, but not the same tensor: schedulers change a tensor in place."""
    return lr.clone() if isinstance(lr, Tensor) else lr
