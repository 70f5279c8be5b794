"""`wrap_optimizer`: the structural risk or a transfer schedule, as hooks of the user's optimizer.

A pre-hook of ``step`` adds the risk's gradient to the gates: once per step, however often the loop
accumulates. A post-hook moves the gates along a schedule. The count of steps lives in the parameter
groups, which every way of saving an optimizer keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from transfer_surgery.transfer.auto_gamma import AutoGamma
from transfer_surgery.transfer.checks import refuse_unfit_optimizer
from transfer_surgery.transfer.controllers import ConstantGamma, Controller, Projection
from transfer_surgery.transfer.param_groups import check_settings, hold_gates
from transfer_surgery.transfer.risk import check_reduction
from transfer_surgery.transfer.schedule import TransferSchedule
from transfer_surgery.transfer.step_hooks import PAUSED, StepHooks, gates_group
from transfer_surgery.units import GatedActivation, gated_activations

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
AnyHook = TypeVar("AnyHook", bound=Callable[..., Any])

_WRAPPED: WeakKeyDictionary[Optimizer, StepHooks] = WeakKeyDictionary()

# Under these names other optimizers keep the one that they wrap: Accelerate and Lightning, SAM,
# timm's Lookahead, and opacus.
_INNER = ("optimizer", "base_optimizer", "_base_optimizer", "original_optimizer")


def wrap_optimizer(
    optimizer: AnyOptimizer,
    model: nn.Module,
    *,
    gamma: float | str | None = None,
    transfer: TransferSchedule | None = None,
    gamma_warmup: int = 0,
    gate_lr: float | None = None,
    gate_weight_decay: float | None = None,
    reduction: str = "sum",
) -> AnyOptimizer:
    """Make an optimizer transfer the gates of a converted model.

    The gates get a parameter group of their own, the last one, whether or not the optimizer was
    built before `convert`; their optimizer state is kept. The parameters of matched targets get
    another one, without weight decay. (LBFGS allows one group: all join it.)
    Call it before learning-rate schedulers are created and before ``load_state_dict``, which then
    continues at the step where the checkpoint was saved. Where a scheduler exists already, the
    gates stay in the group in which the optimizer has them.

    The risk is added inside ``step``, to the gradient that is there by then: clipping
    before ``step`` does not see it. With a closure each evaluation adds it, and the loss that the
    closure returns includes it. Of an optimizer that wraps another (Accelerate's, SAM, Lookahead)
    the inner one's ``step`` counts: SAM perturbs by the gradient of the task alone.

    Of several optimizers of one model wrap one, or each with the submodule that it trains: all
    gates of `model` are moved by `optimizer`.

    A gradient that is not finite stops the step with a FloatingPointError before anything is
    updated (looked for at every step on a CPU, at every 50th elsewhere, where looking costs a
    synchronisation, and not where a GradScaler looks).

    Args:
        optimizer: any `torch.optim.Optimizer` of the model's parameters.
        model: the converted model, also in DDP or after FSDP2's ``fully_shard``.
        gamma: the weight of the structural risk, constant, as in the paper; or ``"auto"`` together
            with `transfer`: a weight that is adapted so that the mean ``P(z != 0)`` comes near the
            schedule, by dual ascent. With Adam or Lion give a `gate_lr` such as 0.3: a gate has to
            move by some 16 in all, and they move it by the learning rate in each step.
        transfer: the share of the gates to transfer, and by when. Without `gamma` no risk is added;
            the gates are moved to the schedule's budget after each step, for any optimizer,
            learning rate and network.
        gamma_warmup: optimizer steps over which a constant gamma rises from 0.
        gate_lr: learning rate of the gates; by default that of the first group.
        gate_weight_decay: weight decay of the gates; by default the largest of the optimizer's
            groups with a constant gamma (it brings ``log_alpha`` from 8 to where the risk acts) and
            0 otherwise (nothing but the schedule is to move all gates together).
        reduction: what one gate counts for in the risk, see `structural_risk`.

    Returns:
        The same object, with hooks. Copies and pickles of an optimizer have no hooks: wrap them
        again. They keep their gates' group and step.

    Raises:
        TypeError: `optimizer` or `transfer` is of another type.
        ValueError: the arguments do not fit together, the model is not converted, or the optimizer
            is wrapped already or is of another model. The optimizer is then unchanged.

    Source:
        Eq. 13 for `gamma`; docs/design.md, "Training", for `transfer`.

    Examples:
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
    sites = dict(gated_activations(model))
    units = list(sites.values())
    _check_training(gamma, transfer, reduction, gamma_warmup, units)
    inner = _innermost(optimizer)
    if inner in _WRAPPED:
        raise ValueError(
            "this optimizer is wrapped already: the risk would count twice. Build a new optimizer "
            "to train with other settings."
        )
    refuse_unfit_optimizer(inner, model)
    learned = [unit for unit in units if unit.gate.learned]
    given = {"lr": gate_lr, "weight_decay": gate_weight_decay}
    settings = {key: value for key, value in given.items() if value is not None}
    check_settings(settings, inner, bool(learned))
    controller = _controller(sites, gamma, transfer, gamma_warmup, reduction)

    decay = [group.get("weight_decay", 0.0) for group in inner.param_groups]
    defaults = {"weight_decay": max(decay) if isinstance(controller, ConstantGamma) else 0.0}
    if isinstance(controller, Projection):
        # Of timm's Lookahead: its average over steps would undo a part of the projection.
        defaults["lookahead_alpha"] = 1.0
    hold_gates(optimizer, inner, model, units, settings, defaults, controller.memory())
    hooks = StepHooks(inner, model, controller)
    inner.register_step_pre_hook(_in_python(hooks.before_step))
    inner.register_step_post_hook(_in_python(hooks.after_step))
    _WRAPPED[inner] = hooks
    return optimizer


def _in_python(hook: AnyHook) -> AnyHook:
    """The hook, which stays Python where ``step`` is compiled.

    Traced, it would be compiled anew at each step of a schedule, whose progress is a number.
    """
    reason = "the hooks of wrap_optimizer run in Python: compile step() without fullgraph=True"
    kept: AnyHook = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return kept


def pause_transfer(optimizer: Optimizer) -> None:
    """Let the clock of the optimizer's `TransferSchedule` stand still, while training goes on.

    The gates are kept at the budget of the last step; a checkpoint remembers the pause. The
    schedule then ends later by as many steps. In a distributed training call it on every rank.

    Args:
        optimizer: an optimizer wrapped with ``transfer=``.

    Raises:
        ValueError: it is not.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> _ = wrap_optimizer(optimizer, model, transfer=TransferSchedule(10))
        >>> pause_transfer(optimizer)  # until accuracy has recovered, say
        >>> optimizer.step()
        >>> resume_transfer(optimizer)
        >>> optimizer.param_groups[-1]["transfer_step"]
        0
    """
    gates_group(_scheduled(optimizer))[PAUSED] = True


def resume_transfer(optimizer: Optimizer) -> None:
    """Undo `pause_transfer`; nothing happens where there is no pause.

    Raises:
        ValueError: the optimizer was not wrapped with ``transfer=``.
    """
    gates_group(_scheduled(optimizer))[PAUSED] = False


def _scheduled(optimizer: Optimizer) -> Optimizer:
    inner = _innermost(optimizer)
    hooks = _WRAPPED.get(inner)
    if hooks is None or isinstance(hooks.controller, ConstantGamma):
        raise ValueError(
            "only a transfer schedule can be paused: wrap this optimizer with "
            "wrap_optimizer(optimizer, model, transfer=TransferSchedule(total_steps)) first."
        )
    return inner


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` updates the parameters, inside of those that wrap it."""
    inner = (getattr(optimizer, name, None) for name in _INNER)
    found = next((o for o in inner if isinstance(o, Optimizer) and o is not optimizer), None)
    return optimizer if found is None else _innermost(found)


def _controller(
    sites: dict[str, GatedActivation],
    gamma: float | str | None,
    transfer: TransferSchedule | None,
    warmup: int,
    reduction: str,
) -> Controller:
    if transfer is None:
        assert isinstance(gamma, (int, float))
        return ConstantGamma(sites, gamma, warmup, reduction)
    return Projection(sites, transfer) if gamma is None else AutoGamma(sites, transfer)


def _check_training(
    gamma: float | str | None,
    transfer: TransferSchedule | None,
    reduction: str,
    warmup: int,
    units: list[GatedActivation],
) -> None:
    constant = gamma is not None and gamma != "auto"
    if constant == (transfer is not None):
        raise ValueError(
            "give exactly one of gamma= (a constant weight of the risk) and "
            "transfer=TransferSchedule(total_steps) (a share of the gates, by a given step), or "
            "gamma='auto' and transfer= (a weight that follows the schedule)."
        )
    check_reduction(reduction)
    if gamma is not None and not any(unit.gate.learned for unit in units):
        raise ValueError(
            f"gates of the kind {units[0].gate.settings.name!r} have no parameters for gamma "
            "to move; use transfer=TransferSchedule(total_steps)."
        )
    if constant and not (isinstance(gamma, (int, float)) and 0 <= gamma < math.inf):
        raise ValueError(f"gamma={gamma}: give a finite number that is not negative, or 'auto'.")
    if warmup and (not constant or warmup < 0):
        raise ValueError(
            f"gamma_warmup={warmup}: steps over which a constant gamma= rises; a transfer schedule "
            "has its own start=."
        )
    if transfer is not None:
        _check_schedule(transfer, reduction, gamma, units)


def _check_schedule(
    transfer: TransferSchedule,
    reduction: str,
    gamma: float | str | None,
    units: list[GatedActivation],
) -> None:
    if not isinstance(transfer, TransferSchedule):
        raise TypeError(f"transfer={transfer!r}: give a TransferSchedule(total_steps).")
    if reduction != "sum":
        raise ValueError(
            f"reduction={reduction!r} weights the risk of gamma=; a transfer schedule counts "
            "every gate once. Leave it out."
        )
    if gamma == "auto" and transfer.order != "joint":
        raise ValueError(
            f"order={transfer.order!r}: gamma='auto' is one weight for all gates. Leave gamma out."
        )
    scheduled = [unit.gate.settings.name for unit in units if not unit.gate.learned]
    if scheduled and transfer.fraction < 1:
        raise ValueError(
            f"gates of the kind {scheduled[0]!r} all go together: use fraction=1, or convert "
            "with gate='hard_concrete' to transfer a share of them."
        )
