"""Optimizers unfit for `wrap_optimizer`, refused with the fix before anything is changed."""

from __future__ import annotations

from torch import nn
from torch.optim import Muon, Optimizer

from transfer_surgery._sharding import is_fsdp, is_sharded, reshard
from transfer_surgery.units import gated_activations


def refuse_unfit_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise where the hooks would not run, or would not reach the gates.

    Raises:
        TypeError: no optimizer of torch.
        ValueError: it is of another model, or its parameters or the gates are not those that are
            trained.
    """
    _check_optimizer(optimizer, model)
    _check_shards(optimizer, model)
    _check_gates(model)


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
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
    # It checks its parameters when it is built only, and would fail at the first step.
    if isinstance(optimizer, Muon) and any(u.gate.learned for _, u in gated_activations(model)):
        raise ValueError(
            "torch.optim.Muon updates matrices as a whole, and gates are none: hold them, like "
            "biases, in a second optimizer such as AdamW, and wrap that one."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"the optimizer holds no parameter of this {type(model).__name__}: pass the model that "
            "it was built for. (After deepcopy or FSDP build the optimizer anew.)"
        )


def _check_shards(optimizer: Optimizer, model: nn.Module) -> None:
    """After an eval forward FSDP2 leaves some parameters gathered, and replaces them later."""
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


def _check_gates(model: nn.Module) -> None:
    learned = {path: unit for path, unit in gated_activations(model) if unit.gate.learned}
    for path, unit in learned.items():
        if unit.log_alpha.shape != unit.gate.shape:
            raise ValueError(
                f"{path}: log_alpha has the shape {tuple(unit.log_alpha.shape)} instead of "
                f"{unit.gate.shape}. FSDP 1 and ZeRO-3 flatten parameters; use fully_shard "
                "(FSDP2) or DDP, and convert before."
            )
    if learned and not any(unit.log_alpha.requires_grad for unit in learned.values()):
        raise ValueError(
            "every gate is frozen, as after freezing the model or PEFT's get_peft_model. Unfreeze "
            "the log_alpha of each GatedActivation in model.modules(): requires_grad_(True)."
        )
