"""`wrap_optimizer`: the structural risk or a transfer schedule, as hooks of the user's optimizer.

A pre-hook of ``step`` adds the risk's gradient to the gates: once per step, however often the loop
accumulates. A post-hook moves the gates along a schedule. The count of steps lives in the parameter
groups, which every way of saving an optimizer keeps.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from transfer_surgery.hooks import STEP, FrozenGatesWarning, ScheduleEndedWarning, StepHooks
from transfer_surgery.risk import check_reduction
from transfer_surgery.schedule import TransferSchedule
from transfer_surgery.unit import GatedActivation, gated_activations

__all__ = ["FrozenGatesWarning", "ScheduleEndedWarning", "wrap_optimizer"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)

_WRAPPED: WeakSet[Optimizer] = WeakSet()


def wrap_optimizer(
    optimizer: AnyOptimizer,
    model: nn.Module,
    *,
    gamma: float | None = None,
    transfer: TransferSchedule | None = None,
    gate_lr: float | None = None,
    gate_weight_decay: float | None = None,
    reduction: str = "sum",
) -> AnyOptimizer:
    """Make an optimizer transfer the gates of a converted model.

    The gates get a parameter group of their own, the last one, whether or not the optimizer was
    built before `convert`; their optimizer state is kept. (LBFGS allows one group: they join it.)
    Call it before learning-rate schedulers are created and before ``load_state_dict``, which then
    continues at the step where the checkpoint was saved.

    The risk is added inside ``step``, to the gradient that is there by then: clipping
    before ``step`` does not see it. With a closure each evaluation adds it, and the loss that the
    closure returns includes it. A gradient that is not finite stops the step with a
    FloatingPointError before anything is updated (looked for at every step on a CPU, at every 50th
    elsewhere, where looking costs a synchronisation, and not where a GradScaler looks).

    Args:
        optimizer: any `torch.optim.Optimizer` of the model's parameters.
        model: the converted model.
        gamma: the weight of the structural risk, constant, as in the paper.
        transfer: or the share of the gates to transfer, and by when; no risk is added then. For any
            optimizer and network the gates follow this schedule.
        gate_lr: learning rate of the gates; by default that of the first group.
        gate_weight_decay: weight decay of the gates; by default the largest of the optimizer's
            groups with `gamma` (it brings ``log_alpha`` from 8 to where the risk acts) and 0 with
            `transfer` (nothing but the schedule is to move all gates together).
        reduction: what one gate counts for in the risk, see `structural_risk`.

    Returns:
        The same object, with hooks. Copies and pickles of an optimizer have no hooks: wrap them
        again. They keep their gates' group and step.

    Raises:
        TypeError: `optimizer` or `transfer` is of another type.
        ValueError: the arguments do not fit together, the model is not converted, or the optimizer
            is wrapped already or is of another model. The optimizer is then unchanged.

    Source:
        Eq. 13 for `gamma`; DESIGN section 4 for `transfer`.

    Example:
        >>> import torch
        >>> from transfer_surgery import convert
        >>> network = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> model = convert(network, example_input=torch.zeros(1, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = wrap_optimizer(optimizer, model, transfer=TransferSchedule(10))
        >>> for _ in range(10):
        ...     model(torch.randn(8, 2)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> model[1].gate.predict().tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    units = list(gated_activations(model))
    _check_training(gamma, transfer, reduction, [unit for _, unit in units])
    _check_optimizer(optimizer, model)
    learned = [unit for _, unit in units if unit.gate.learned]
    given = {"lr": gate_lr, "weight_decay": gate_weight_decay}
    settings = {key: value for key, value in given.items() if value is not None}
    _check_settings(settings, optimizer, bool(learned))

    if not learned:
        optimizer.param_groups[0].setdefault(STEP, 0)
    elif isinstance(optimizer, LBFGS):
        _join_only_group(optimizer, learned)
    else:
        _move_to_own_group(optimizer, model, learned, settings, decay=gamma is not None)
    hooks = StepHooks(optimizer, model, gamma, transfer, reduction)
    optimizer.register_step_pre_hook(hooks.before_step)
    optimizer.register_step_post_hook(hooks.after_step)
    _WRAPPED.add(optimizer)
    return optimizer


def _check_training(
    gamma: float | None,
    transfer: TransferSchedule | None,
    reduction: str,
    units: list[GatedActivation],
) -> None:
    if (gamma is None) == (transfer is None):
        raise ValueError(
            "give exactly one of gamma= (a constant weight of the risk) and "
            "transfer=TransferSchedule(total_steps) (a share of the gates, by a given step)."
        )
    check_reduction(reduction)
    if gamma is not None:
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma={gamma}: give a finite number that is not negative.")
        if not any(unit.gate.learned for unit in units):
            raise ValueError(
                f"gates of the kind {units[0].gate.name!r} have no parameters that gamma could "
                "move; use transfer=TransferSchedule(total_steps)."
            )
    if transfer is not None:
        if not isinstance(transfer, TransferSchedule):
            raise TypeError(f"transfer={transfer!r}: give a TransferSchedule(total_steps).")
        if reduction != "sum":
            raise ValueError(
                f"reduction={reduction!r} weights the risk of gamma=; a transfer schedule counts "
                "every gate once. Leave it out."
            )
        scheduled = [unit.gate.name for unit in units if not unit.gate.learned]
        if scheduled and transfer.fraction < 1:
            raise ValueError(
                f"gates of the kind {scheduled[0]!r} all go together: use fraction=1, or convert "
                "with gate='hard_concrete' to transfer a share of them."
            )


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer.")
    if optimizer in _WRAPPED:
        raise ValueError(
            "this optimizer is wrapped already: the risk would count twice. Build a new optimizer "
            "to train with other settings."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"the optimizer holds no parameter of this {type(model).__name__}: pass the model that "
            "it was built for. (After deepcopy or FSDP build the optimizer anew.)"
        )


def _check_settings(settings: dict[str, float], optimizer: Optimizer, learned: bool) -> None:
    for key, value in settings.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"gate_{key}={value}: give a finite number that is not negative.")
        if isinstance(optimizer, LBFGS):
            raise ValueError(f"gate_{key}: LBFGS allows only one parameter group. Leave it out.")
        if not learned:
            raise ValueError(f"gate_{key}: these gates have no parameters. Leave it out.")
        if key not in optimizer.defaults:
            raise ValueError(f"gate_{key}: {type(optimizer).__name__} has no {key}. Leave it out.")


def _join_only_group(optimizer: LBFGS, units: list[GatedActivation]) -> None:
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
    model: nn.Module,
    units: list[GatedActivation],
    settings: dict[str, float],
    decay: bool,
) -> None:
    groups = optimizer.param_groups
    earlier = next((group for group in groups if STEP in group), None)
    if earlier is not None:  # a copy of a wrapped optimizer
        earlier.update(settings)
        return
    if any("initial_lr" in group for group in groups):
        raise ValueError(
            "a learning-rate scheduler was created for this optimizer: it would not know the group "
            "of the gates. Create it after wrap_optimizer. (If it is no longer in use, delete "
            "'initial_lr' from optimizer.param_groups first.)"
        )
    gates = {unit.log_alpha for unit in units}
    own: dict[str, Any] = {"lr": _copy(groups[0]["lr"]), STEP: 0}
    if "weight_decay" in optimizer.defaults:
        own["weight_decay"] = max(group["weight_decay"] for group in groups) if decay else 0.0
    named = "param_names" in groups[0]
    own["params"] = [(n, p) if named else p for n, p in model.named_parameters() if p in gates]
    for group in groups:
        stay = [i for i, p in enumerate(group["params"]) if p not in gates]
        for key in ("params", "param_names") if named else ("params",):
            group[key] = [group[key][i] for i in stay]
    optimizer.add_param_group(own | settings)


def _copy(lr: float | Tensor) -> float | Tensor:
    """The same value, but not the same tensor: schedulers change a tensor in place."""
    return lr.clone() if isinstance(lr, Tensor) else lr
