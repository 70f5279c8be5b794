"""What `wrap_optimizer` refuses, with the fix and before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import LBFGS, Muon, Optimizer, SparseAdam

from transfer_surgery._sharding import is_fsdp, is_sharded, reshard
from transfer_surgery.transfer.risk import check_reduction
from transfer_surgery.transfer.schedule import TransferSchedule
from transfer_surgery.units import GatedActivation, check_gates_not_flattened


def check_training(
    gamma: float | None,
    transfer: TransferSchedule | None,
    reduction: str,
    warmup: int,
    units: Sequence[GatedActivation],
) -> None:
    """Raise where the arguments of `wrap_optimizer` do not fit together, or not to the gates."""
    if (gamma is None) == (transfer is None):
        raise ValueError(
            "give exactly one of gamma= (a constant weight of the risk) and "
            "transfer=TransferSchedule(total_steps) (a share of the gates, by a given step)."
        )
    check_reduction(reduction)
    if transfer is not None:
        _check_schedule(transfer, reduction, warmup, units)
        return
    assert gamma is not None
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma!r}: give a finite number that is not negative.")
    if warmup < 0:
        raise ValueError(f"gamma_warmup={warmup}: give a number of optimizer steps, 0 or more.")
    if not any(unit.gate.learned for unit in units):
        raise ValueError(
            f"gates of the kind {units[0].gate.settings.name!r} have no parameters for gamma "
            "to move; use transfer=TransferSchedule(total_steps)."
        )


def _check_schedule(
    transfer: TransferSchedule, reduction: str, warmup: int, units: Sequence[GatedActivation]
) -> None:
    if reduction != "sum":
        raise ValueError(
            f"reduction={reduction!r} weights the risk of gamma=; a transfer schedule counts "
            "every gate once. Leave it out."
        )
    if warmup:
        raise ValueError(
            f"gamma_warmup={warmup} is for a constant gamma=; a transfer schedule has its own "
            "start=. Leave it out."
        )
    scheduled = [unit.gate.settings.name for unit in units if not unit.gate.learned]
    if scheduled and transfer.fraction < 1:
        raise ValueError(
            f"gates of the kind {scheduled[0]!r} all go together: use fraction=1, or convert "
            "with gate='hard_concrete' to transfer a share of them."
        )


def check_settings(settings: Mapping[str, float], optimizer: Optimizer, learned: bool) -> None:
    """Raise ValueError where the optimizer cannot hold gates with these settings."""
    for key, value in settings.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"gate_{key}={value}: give a finite number that is not negative.")
        if isinstance(optimizer, LBFGS):
            raise ValueError(f"gate_{key}: LBFGS allows only one parameter group. Leave it out.")
        if not learned:
            raise ValueError(f"gate_{key}: these gates have no parameters. Leave it out.")
        if key not in optimizer.defaults:
            raise ValueError(f"gate_{key}: {type(optimizer).__name__} has no {key}. Leave it out.")


def check_optimizer(
    optimizer: Optimizer, model: nn.Module, sites: Mapping[str, GatedActivation]
) -> None:
    """Raise where the hooks would not run, or would not reach the gates.

    Args:
        optimizer: the optimizer whose ``step`` updates the parameters.
        model: the converted model.
        sites: the units of the model, by path.

    Raises:
        TypeError: it is not an optimizer of torch.
        ValueError: it belongs to another model, or its parameters or the gates are not those that
            are trained.
    """
    learned = {path: unit for path, unit in sites.items() if unit.gate.learned}
    _check_hooks(optimizer, model, bool(learned))
    _check_shards(optimizer, model)
    _check_gates(learned)


def _check_hooks(optimizer: Optimizer, model: nn.Module, learned: bool) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer.")
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer steps a part of the parameters on each rank, and would move "
            "a part of the gates: use fully_shard(model), which shards the optimizer's state too."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{type(optimizer).__name__} did not call torch.optim.Optimizer.__init__ and runs no "
            "step hooks: wrap the optimizer inside it instead."
        )
    # These check what they get only when they are built, or would fail at the first step.
    for kind, why in (
        (Muon, "updates matrices as a whole, and gates are not matrices"),
        (SparseAdam, "takes sparse gradients alone, and those of gates are dense"),
    ):
        if isinstance(optimizer, kind) and learned:
            raise ValueError(
                f"torch.optim.{kind.__name__} {why}: give them, like biases, to a second optimizer "
                "such as AdamW, and wrap that one."
            )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"the optimizer holds no parameter of this {type(model).__name__}: pass the model that "
            "it was built for. (After deepcopy or FSDP build the optimizer anew.)"
        )


def _check_shards(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse parameters that FSDP2 gathered for an eval forward, since it replaces them later."""
    modules = [module for module in model.modules() if is_fsdp(module)]
    if not modules:
        return
    reshard(modules)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.numel() and not is_sharded(p) and not p.untyped_storage().size() for p in parameters):
        raise ValueError(
            "the optimizer holds parameters that FSDP2 had gathered for a forward pass, and has "
            "freed: call model.reshard() before you build the optimizer."
        )


def _check_gates(learned: Mapping[str, GatedActivation]) -> None:
    check_gates_not_flattened(learned)
    if learned and not any(unit.log_alpha.requires_grad for unit in learned.values()):
        raise ValueError(
            "every gate is frozen, as after freezing the model or PEFT's get_peft_model. Unfreeze "
            "the log_alpha of each GatedActivation in model.modules(): requires_grad_(True)."
        )
