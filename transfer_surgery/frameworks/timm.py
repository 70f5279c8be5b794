"""`wrap_timm_optimizer`: a line for timm's ``train.py``, and for scripts that were made from it."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery.frameworks.records import Schedule, make_schedule
from transfer_surgery.transfer import STEP, TransferSchedule, wrap_optimizer
from transfer_surgery.units import gated_activations

try:
    from timm.optim.lookahead import Lookahead
    from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
except ImportError as error:
    raise ImportError("this needs timm: pip install 'transfer-surgery[timm]'") from error

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


class _Loader(Protocol):
    def __len__(self) -> int: ...


def wrap_timm_optimizer(
    optimizer: AnyOptimizer,
    model: nn.Module,
    args: Any,
    loader: _Loader,
    schedule: Schedule = TransferSchedule,
) -> AnyOptimizer:
    """`wrap_optimizer` for the optimizer of a ``train.py``, over all of its epochs.

    Two lines make timm's ``train.py`` transfer gates: ``convert(model)`` after ``create_model``,
    and this one anywhere between ``create_loader`` and the first epoch, before or after
    ``create_scheduler_v2``. Gates and fitted targets stay in the parameter groups that
    ``create_optimizer_v2`` gave them (without weight decay, since they are vectors), so that
    ``resume_checkpoint``, which ``train.py`` calls earlier, fits: the schedule continues where the
    checkpoint was saved. With ``--no-resume-opt`` it begins anew.

    Gates are left out of the slow weights of a Lookahead optimizer, which would bring transferred
    gates back half-way, even after the last step. A ``ModelEmaV3`` averages gates like all
    parameters; give it time after the end of the schedule. For a `gate_lr` of their own, or for a
    constant gamma, call `wrap_optimizer` right after ``create_optimizer_v2`` instead.

    Args:
        optimizer: what ``create_optimizer_v2`` made of the converted model.
        model: the converted model, also inside DDP or ``torch.compile``.
        args: the namespace of ``train.py``, or any object with its attributes.
        loader: the training loader.
        schedule: a function that makes the schedule from the number of optimizer steps,
            `total_updates`; by default `TransferSchedule` itself. Or a schedule.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not converted, or was converted or matched only after the optimizer
            had been built.
        ImportError: timm is not installed.

    Examples:
        >>> from argparse import Namespace
        >>> import timm
        >>> from timm.optim import create_optimizer_v2
        >>> from transfer_surgery import convert
        >>> args = Namespace(epochs=4, sched="cosine", cooldown_epochs=1, grad_accum_steps=2)
        >>> model = convert(timm.create_model("test_resnet"))
        >>> optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4)
        >>> loader = range(25)  # stands for a loader of 25 batches
        >>> optimizer = wrap_timm_optimizer(
        ...     optimizer, model, args, loader, lambda steps: TransferSchedule(steps, fraction=0.5)
        ... )
        >>> total_updates(args, loader)
        65
    """
    units = [unit for _, unit in gated_activations(model)]
    gates = {u.log_alpha for u in units if u.gate.learned and u.log_alpha.requires_grad}
    base = optimizer._base_optimizer if isinstance(optimizer, Lookahead) else optimizer
    targets = {p for u in units if u.fitted is not None for p in u.fitted.parameters()}
    marked = _mark(base, gates, {p for p in targets if p.requires_grad})
    try:
        made = make_schedule(schedule, lambda: total_updates(args, loader))
        wrap_optimizer(base, model, transfer=made)
    except Exception:
        for group in marked:
            del group[STEP]
        raise
    if isinstance(optimizer, Lookahead):
        _leave_out(optimizer, gates)
    return optimizer


def total_updates(args: Any, loader: _Loader) -> int:
    """Optimizer updates of a whole ``train.py``: with cycles, cooldown and warmup prefix.

    Args:
        args: the namespace of ``train.py``, or any object with its attributes.
        loader: the training loader.

    Examples:
        >>> from types import SimpleNamespace
        >>> total_updates(SimpleNamespace(epochs=10, sched="none"), range(25))
        250
    """
    every = getattr(args, "grad_accum_steps", 1)
    updates_per_epoch = -(-len(loader) // every)
    # timm's own answer, for an optimizer that is thrown away.
    nothing = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    _, epochs = create_scheduler_v2(
        nothing, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    return int(epochs) * updates_per_epoch


def _mark(optimizer: Optimizer, gates: Set[Tensor], targets: Set[Tensor]) -> list[dict[str, Any]]:
    """Keep all groups as they are: `wrap_optimizer` moves nothing where a group counts steps."""
    groups = optimizer.param_groups
    held = {p for group in groups for p in group["params"]}
    own = gates | targets
    if not own <= held:
        raise ValueError(
            f"the optimizer holds {len(own & held)} of the {len(own)} parameters of gates and "
            "fitted targets: call convert(model) before create_optimizer_v2(model), and "
            "match_targets between them."
        )
    if any(STEP in group for group in groups):  # restored from a checkpoint
        return []
    homes = (group for group in groups if not gates.isdisjoint(group["params"]))
    home = next(homes, groups[0])  # gates without parameters are in none
    home[STEP] = 0
    return [home]


def _leave_out(optimizer: Any, gates: Set[Tensor]) -> None:
    """Keep gates out of Lookahead's averages, in ``step`` and in ``sync_lookahead``."""
    update_slow = optimizer.update_slow

    def update_others(group: dict[str, Any]) -> None:
        update_slow(group | {"params": [p for p in group["params"] if p not in gates]})

    optimizer.update_slow = update_others
