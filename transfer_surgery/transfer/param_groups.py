"""The parameter groups of gates and fitted targets: groups of their own where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from transfer_surgery.units import GatedActivation

# The state of a transfer lives under these keys of a parameter group, where every way of saving an
# optimizer keeps it.

STEP = "transfer_step"
"""Optimizer steps since the start of the transfer, without pauses and skipped steps."""

PAUSED = "transfer_paused"
"""Whether the schedule is paused."""


def gates_group(optimizer: Optimizer) -> dict[str, Any]:
    """The group with the gates. Looked up each time, since `load_state_dict` replaces groups."""
    groups = optimizer.param_groups
    return next((group for group in groups if STEP in group), groups[0])


def next_step(optimizer: Optimizer) -> int:
    """The number of the step being taken, from 1; in a pause that of the step before."""
    group = gates_group(optimizer)
    return int(group.get(STEP, 0)) + (not group.get(PAUSED, False))


def add_gates_to_optimizer(
    optimizer: Optimizer,
    inner: Optimizer,
    model: nn.Module,
    units: Sequence[GatedActivation],
    settings: Mapping[str, float],
    defaults: Mapping[str, float],
) -> None:
    """Make the optimizer hold gates and fitted targets, and keep its state in the gates' group.

    Args:
        optimizer: the optimizer as the user has it.
        inner: the optimizer inside that updates the parameters, or the same one.
        model: the converted model.
        units: the units of the model.
        settings: settings of the gates' group, checked by `check_settings`.
        defaults: further settings of a new group; those that the optimizer does not know are
            left out.

    Raises:
        ValueError: the gates need a group that they cannot have.
    """
    groups = inner.param_groups
    gates = [unit.log_alpha for unit in units if unit.gate.learned]
    targets = [p for unit in units if unit.fitted is not None for p in unit.fitted.parameters()]
    before = [(group, {**group, "params": list(group["params"])}) for group in groups]
    try:
        _add_targets(optimizer, inner, model, targets)
        group = _group_for(gates, optimizer, inner, model, settings, defaults)
    except Exception:  # from add_param_group, for example: put everything back
        for changed, old in before:
            changed.update(old)
        groups[:] = [group for group, _ in before]
        raise
    group.setdefault(STEP, 0)
    group.setdefault(PAUSED, False)


def _add_targets(
    optimizer: Optimizer, inner: Optimizer, model: nn.Module, own: list[nn.Parameter]
) -> None:
    """Put the parameters of fitted targets in a group without weight decay, where possible.

    Weight decay would draw their amplitudes and frequencies to 0.
    """
    groups = inner.param_groups
    holding = [group for group in groups if not set(own).isdisjoint(group["params"])]
    if not own or (len(holding) == 1 and set(holding[0]["params"]) == set(own)):
        return
    if _marked(groups) and _hold(holding, own):
        return
    if isinstance(inner, LBFGS):
        _join_only_group(inner, own)
    elif any("initial_lr" in group for group in groups):
        _leave_in_place(holding, own, {})
    else:
        settings = {"weight_decay": 0.0} if "weight_decay" in inner.defaults else {}
        _move_to_own_group(own, optimizer, inner, model, settings)


def _group_for(
    gates: list[nn.Parameter],
    optimizer: Optimizer,
    inner: Optimizer,
    model: nn.Module,
    settings: Mapping[str, float],
    defaults: Mapping[str, float],
) -> dict[str, Any]:
    """The group that is to hold the gates, after they were put there."""
    groups = inner.param_groups
    if not gates:
        return groups[0]
    if isinstance(inner, LBFGS):
        return _join_only_group(inner, gates)
    holding = [group for group in groups if not set(gates).isdisjoint(group["params"])]
    marked = _marked(groups)
    if marked or (len(holding) == 1 and set(holding[0]["params"]) == set(gates)):
        return _keep_group((marked or holding)[0], holding, gates, settings)
    if any("initial_lr" in group for group in groups):
        return _leave_in_place(holding, gates, settings)
    own = {key: value for key, value in defaults.items() if key in inner.defaults}
    return _move_to_own_group(gates, optimizer, inner, model, own | dict(settings))


def _join_only_group(optimizer: LBFGS, gates: list[nn.Parameter]) -> dict[str, Any]:
    group: dict[str, Any] = optimizer.param_groups[0]
    held = set(group["params"])
    if not held.issuperset(gates):
        # In place: LBFGS keeps a reference to this very list.
        group["params"].extend(gate for gate in gates if gate not in held)
        optimizer._numel_cache = None
        optimizer.state.clear()  # its curvature history has the old number of parameters
    return group


def _keep_group(
    group: dict[str, Any],
    holding: list[dict[str, Any]],
    gates: list[nn.Parameter],
    settings: Mapping[str, float],
) -> dict[str, Any]:
    """The group that the gates have already."""
    if not _hold(holding, gates):
        raise ValueError(
            "this optimizer was wrapped for other gates than the model has now: build it anew."
        )
    if settings and not set(gates).issuperset(group["params"]):
        raise ValueError(
            f"gate_{next(iter(settings))}: the gates share a parameter group with weights. Leave "
            "it out, or build the optimizer anew."
        )
    group.update(settings)
    return group


def _leave_in_place(
    holding: list[dict[str, Any]], gates: list[nn.Parameter], settings: Mapping[str, float]
) -> dict[str, Any]:
    """A learning-rate scheduler knows the groups that there are: it must not find another one."""
    if settings or not _hold(holding, gates):
        wrong = f"gate_{next(iter(settings))} needs" if settings else "gates and targets need"
        raise ValueError(
            "a learning-rate scheduler was created for this optimizer: it would not know the group "
            f"that {wrong}. Create it after wrap_optimizer, or build the optimizer from the "
            "converted model's parameters: gates then stay in the group they are in. (If the "
            "scheduler is no longer in use, delete 'initial_lr' from optimizer.param_groups first.)"
        )
    return holding[0]


def _move_to_own_group(
    gates: list[nn.Parameter],
    optimizer: Optimizer,
    inner: Optimizer,
    model: nn.Module,
    settings: dict[str, float],
) -> dict[str, Any]:
    groups, moved = inner.param_groups, set(gates)
    named = "param_names" in groups[0]
    own: dict[str, Any] = {"lr": _copy(groups[0]["lr"])} if "lr" in groups[0] else {}
    own["params"] = [(n, p) if named else p for n, p in model.named_parameters() if p in moved]
    for group in groups:
        stay = [i for i, p in enumerate(group["params"]) if p not in moved]
        for key in ("params", "param_names") if named else ("params",):
            group[key] = [group[key][i] for i in stay]
    # Of the outer optimizer, which may want settings of its own in each group.
    optimizer.add_param_group(own | settings)
    # What held nothing but gates goes: some checkpoints lose the settings of an empty group.
    groups[:] = [group for group in groups if group["params"]]
    return groups[-1]


def _marked(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that count steps: the optimizer is a copy of a wrapped one, or our caller marked them.

    What such an optimizer holds stays where it is: a checkpoint has the same groups.
    """
    return [group for group in groups if STEP in group]


def _hold(groups: list[dict[str, Any]], own: list[nn.Parameter]) -> bool:
    """Whether the groups hold all of these parameters that are trained."""
    return {p for g in groups for p in g["params"]}.issuperset(p for p in own if p.requires_grad)


def _copy(lr: float | Tensor) -> float | Tensor:
    """The same value, but not the same tensor: schedulers change a tensor in place."""
    return lr.clone() if isinstance(lr, Tensor) else lr
