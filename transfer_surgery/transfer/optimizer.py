"""`wrap_optimizer`: the structural risk or a transfer schedule, as hooks of the user's optimizer.

A pre-hook of ``step`` adds the risk's gradient to the gates: once per step, however often the loop
accumulates. A post-hook moves the gates along a schedule. The count of steps lives in the parameter
groups, which every way of saving an optimizer keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from transfer_surgery._messages import check_arguments
from transfer_surgery.transfer.checks import check_optimizer, check_settings, check_training
from transfer_surgery.transfer.controllers import Projection, Risk
from transfer_surgery.transfer.param_groups import PAUSED, add_gates_to_optimizer, gates_group
from transfer_surgery.transfer.schedule import TransferSchedule
from transfer_surgery.transfer.step_hooks import StepHooks
from transfer_surgery.transfer.wrapped_optimizers import WRAPPED, earlier_hooks, innermost
from transfer_surgery.units import gated_activations

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
AnyHook = TypeVar("AnyHook", bound=Callable[..., Any])


def wrap_optimizer(
    optimizer: AnyOptimizer,
    model: nn.Module,
    *,
    gamma: float | None = None,
    transfer: TransferSchedule | None = None,
    gamma_warmup: int = 0,
    gate_lr: float | None = None,
    gate_weight_decay: float | None = None,
    reduction: str = "sum",
) -> AnyOptimizer:
    """Make an optimizer transfer the gates of a converted model.

    The gates get a parameter group of their own, the last one, whether or not the optimizer was
    built before `convert`; their optimizer state is kept. The parameters of fitted targets get
    another group, without weight decay. (LBFGS allows one group: all join it.)
    Call `wrap_optimizer` before you create learning-rate schedulers, and before
    ``load_state_dict``, which then continues at the step where the checkpoint was saved. If a
    scheduler exists already, the gates stay in the group in which the optimizer has them.

    The risk is added inside ``step``, to the gradient that is there by then: clipping before
    ``step`` does not see it. With a closure each evaluation adds it, and the loss that the closure
    returns includes it. If an optimizer wraps another one (Accelerate's, SAM, Lookahead), the
    inner one's ``step`` counts: SAM perturbs by the gradient of the task alone. Steps that a
    GradScaler skips do not advance a schedule.

    If a model has several optimizers, wrap one of them, or each with the submodule that it trains:
    an optimizer moves all gates of `model`. A new optimizer of the same parameters replaces an
    earlier one, which then leaves the gates alone.

    A gradient that is not finite stops the step with a FloatingPointError before anything is
    updated. On a CPU every step looks for one. Elsewhere looking costs a synchronisation, so only
    every 50th step looks, and no step does where a GradScaler looks itself.

    Args:
        optimizer: any `torch.optim.Optimizer` of the model's parameters.
        model: the converted model, also in DDP or after FSDP2's ``fully_shard``.
        gamma: the constant weight of the structural risk, as in the paper.
        transfer: the share of the gates to transfer, and by when. No risk is added; the gates are
            moved to the schedule's budget after each step, for any optimizer, learning rate and
            network.
        gamma_warmup: optimizer steps over which `gamma` rises from 0.
        gate_lr: learning rate of the gates; by default that of the first group.
        gate_weight_decay: weight decay of the gates. The default with `gamma` is the largest of
            the optimizer's groups: it brings ``log_alpha`` from 8 to where the risk acts. The
            default with `transfer` is 0: only the schedule moves all gates together.
        reduction: what one gate counts for in the risk, see `structural_risk`.

    Returns:
        The same object, with hooks. Copies and pickles of an optimizer have no hooks: wrap them
        again. They keep their gates' group and step.

    Raises:
        TypeError: `optimizer` or `transfer` is of another type.
        ValueError: the arguments do not fit together, the model is not converted, the optimizer is
            wrapped already or belongs to another model, or an optimizer of other parameters moves
            these gates. The optimizer is then unchanged.
        FloatingPointError: ``step`` raises it later, where a gradient is not finite.
        RuntimeError: ``step`` raises it later, where the model was converted or matched since, so
            that this optimizer does not know all of its parameters, or where a CUDA graph captures
            the step.

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
    check_arguments(wrap_optimizer, locals())
    # Check everything before anything is changed.
    sites = dict(gated_activations(model))
    units = list(sites.values())
    check_training(gamma, transfer, reduction, gamma_warmup, units)
    inner = innermost(optimizer)
    if inner in WRAPPED:
        raise ValueError(
            "this optimizer is wrapped already: the risk would count twice. Build a new optimizer "
            "to train with other settings."
        )
    check_optimizer(inner, model, sites)
    replaced = earlier_hooks(inner, sites)
    given = {"lr": gate_lr, "weight_decay": gate_weight_decay}
    settings = {key: value for key, value in given.items() if value is not None}
    check_settings(settings, inner, any(unit.gate.learned for unit in units))

    # Choose what moves the gates, and the settings of their parameter group.
    controller: Risk | Projection
    if transfer is None:
        assert gamma is not None
        controller = Risk(units, gamma, gamma_warmup, reduction)
        defaults = {"weight_decay": max(g.get("weight_decay", 0.0) for g in inner.param_groups)}
    else:
        controller = Projection(sites, transfer)
        # timm's Lookahead would average over steps and undo a part of the projection.
        defaults = {"weight_decay": 0.0, "lookahead_alpha": 1.0}
    add_gates_to_optimizer(optimizer, inner, model, units, settings, defaults)

    # Install the hooks.
    hooks = StepHooks(inner, model, sites, controller)
    inner.register_step_pre_hook(_in_python(hooks.before_step))
    inner.register_step_post_hook(_in_python(hooks.after_step))
    inner.register_state_dict_pre_hook(lambda saved: hooks.count_skipped(saved, wait=True))
    WRAPPED[inner] = hooks
    for earlier in replaced:
        earlier.is_retired = True
    return optimizer


def _in_python(hook: AnyHook) -> AnyHook:
    """A hook that stays Python where ``step`` is compiled.

    The compiler would compile it anew at each step of a schedule, whose progress is a number.
    """
    reason = "the hooks of wrap_optimizer run in Python: compile step() without fullgraph=True"
    kept: AnyHook = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return kept


def pause_transfer(optimizer: Optimizer) -> None:
    """Stop the clock of the optimizer's `TransferSchedule` while the training goes on.

    The gates are kept at the budget of the last step, and checkpoints remember the pause. The
    schedule then ends later by as many steps. In a distributed training call it on every rank.

    Args:
        optimizer: an optimizer wrapped with ``transfer=``.

    Raises:
        ValueError: the optimizer was not wrapped with ``transfer=``.

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
    check_arguments(pause_transfer, locals())
    gates_group(_scheduled(optimizer))[PAUSED] = True


def resume_transfer(optimizer: Optimizer) -> None:
    """Let a `TransferSchedule` go on where `pause_transfer` stopped it, if it did.

    Args:
        optimizer: an optimizer wrapped with ``transfer=``.

    Raises:
        ValueError: the optimizer was not wrapped with ``transfer=``.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> _ = wrap_optimizer(optimizer, model, transfer=TransferSchedule(10))
        >>> pause_transfer(optimizer)
        >>> optimizer.step()
        >>> resume_transfer(optimizer)
        >>> optimizer.step()
        >>> optimizer.param_groups[-1]["transfer_step"]
        1
    """
    check_arguments(resume_transfer, locals())
    gates_group(_scheduled(optimizer))[PAUSED] = False


def _scheduled(optimizer: Optimizer) -> Optimizer:
    inner = innermost(optimizer)
    hooks = WRAPPED.get(inner)
    if hooks is None or hooks.projection is None:
        raise ValueError(
            "only a transfer schedule can be paused: wrap this optimizer with "
            "wrap_optimizer(optimizer, model, transfer=TransferSchedule(total_steps)) first."
        )
    return inner
