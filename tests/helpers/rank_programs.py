"""What the tests of distributed training run in each of two processes.

A module of its own, because spawned processes import it by name.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import always_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.ranks import (
    BATCH,
    GAMMA,
    OPTIMIZERS,
    RANKS,
    SETTINGS,
    STEPS,
    Result,
    fitted_network,
    loss,
    network,
    shard,
    train,
    whole_state,
    wrapped,
)
from transfer_surgery import (
    bake,
    convert,
    load_gates,
    match_targets,
    report,
    revert,
    save_gates,
    structural_risk,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations


def ddp(optimizer: str, how: str) -> Result:
    model = network()
    parallel = DistributedDataParallel(model)
    train(parallel, wrapped(parallel, optimizer, how), range(STEPS))
    return {"state": model.state_dict(), "report": report(parallel).to_dict()}


def fsdp(optimizer: str, how: str) -> Result:
    model = shard(network())
    train(model, wrapped(model, optimizer, how), range(STEPS))
    risk = structural_risk(model)
    (gradient,) = torch.autograd.grad(risk, [model[4].log_alpha])
    rows = report(model).to_dict()
    shards = [u.log_alpha.to_local().numel() for _, u in gated_activations(model)]
    return {
        "state": whole_state(model),
        "report": rows,
        "risk": risk.detach(),
        "gradient": gradient.full_tensor(),
        "shards": shards,
    }


def flattened(baked: bool) -> Result:
    """One step of FSDP 1, which frees a module's parameters but for the time of its own call."""
    model: nn.Module = fitted_network(baked)
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=always_wrap_policy, device_id=torch.device("cpu")
    )
    opt = SGD(model.parameters(), lr=0.1)
    size = BATCH // RANKS
    loss(model, 0, slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)).backward()
    opt.step()
    with FullyShardedDataParallel.summon_full_params(model):
        state = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in model.named_parameters()
        }
    refused = ""
    if not baked:
        try:
            wrap_optimizer(opt, model, gamma=GAMMA)
        except ValueError as error:
            refused = str(error)
    return {"state": state, "refused": refused}


def in_turn(calls: dict[Any, tuple[Any, ...]]) -> Result:
    """What several programs return; two processes that import torch take longer than any."""
    return {name: program(*args) for name, (program, *args) in calls.items()}


def checkpoint(optimizer: str, how: str, folder: Path) -> Result:
    """Saved in mid-transfer and continued; and loaded into a new model and continued."""

    def start() -> tuple[nn.Sequential, Optimizer]:
        model = shard(network())
        return model, wrapped(model, optimizer, how)

    def state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    model, opt = start()
    train(model, opt, range(STEPS))
    dcp.save(state(model, opt), checkpoint_id=folder)
    train(model, opt, range(STEPS, 2 * STEPS))

    other, other_opt = start()
    loaded = state(other, other_opt)
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        other,
        other_opt,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    train(other, other_opt, range(STEPS, 2 * STEPS))
    steps = other_opt.param_groups[-1]["transfer_step"]
    return {"state": whole_state(model), "resumed": whole_state(other), "steps": steps}


def not_finite(kind: str) -> Result:
    """One rank's loss is not finite: both must stop, and neither be updated."""
    model = network()
    parallel: nn.Module = DistributedDataParallel(model) if kind == "ddp" else shard(model)
    optimizer = wrapped(parallel, "adamw", "schedule")
    before = {k: v.clone() for k, v in whole_state(parallel).items()}
    factor = float("inf") if dist.get_rank() == 1 else 1.0
    (loss(parallel, 0) * factor).backward()
    message = ""
    try:
        optimizer.step()
    except FloatingPointError as error:
        message = str(error)
    after = whole_state(parallel)
    same = all(torch.equal(before[key], after[key]) for key in before)
    return {"message": message, "same": same}


def corners() -> Result:
    """What goes wrong where ranks decide alone, or write into parameters that are not sharded."""
    return {
        "warm-up from 0": _warm_up_from_zero(),
        "partly sharded": _not_finite_where_partly_sharded(),
        "evaluation": _evaluation_before_the_step(),
        "late wrap": _wrapped_after_an_evaluation(),
    }


def _warm_up_from_zero() -> Tensor:
    """Rank 1's shards have no gradient at all: its part of a bias of one element is empty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1, bias=False))
    convert(model, example_input=torch.zeros(2, 6), seed=1)
    model[0].requires_grad_(False)
    fully_shard(model)
    optimizer = wrapped(model, "adamw", "schedule")
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    for _ in range(STEPS):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return structural_risk(model, "mean").detach()


def _not_finite_where_partly_sharded() -> str:
    model = network()
    fully_shard(model[2])
    optimizer = wrapped(model, "adamw", "schedule")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 1:
        model[2][0].bias.grad.to_local().fill_(float("inf"))
    try:
        optimizer.step()
    except FloatingPointError as error:
        return str(error)
    return ""


def _evaluation_before_the_step() -> Tensor:
    model = shard(network())
    optimizer = wrapped(model, "adamw", "schedule")
    for step in range(STEPS):
        loss(model, step).backward()
        with torch.no_grad():
            model(torch.zeros(2, 6))  # leaves the root's parameters whole
        optimizer.step()
        optimizer.zero_grad()
    return structural_risk(model, "mean").detach()


def _wrapped_after_an_evaluation() -> tuple[list[int], str]:
    model = shard(network())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with torch.no_grad():
        model(torch.zeros(2, 6))
    wrap_optimizer(optimizer, model, **SETTINGS["schedule"])
    get_state_dict(model, optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]

    with torch.no_grad():
        model(torch.zeros(2, 6))
    message = ""
    try:
        wrapped(model, "adamw", "schedule")  # built of the parameters of the moment
    except ValueError as error:
        message = str(error)
    return sizes, message


def low_precision(how: str) -> Result:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(network(), policy)
    train(model, wrapped(model, "adamw", how), range(STEPS))
    return {"dtype": model[4].log_alpha.dtype, "risk": structural_risk(model, "mean").detach()}


def gates_only(folder: Path) -> Result:
    """Gates of a sharded model saved, loaded into a base model, and into another sharded one."""
    model = shard(network())
    train(model, wrapped(model, "adamw", "part by part"), range(STEPS))
    save_gates(model, folder)
    dist.barrier()
    other = shard(network())
    gates = [unit.log_alpha for _, unit in gated_activations(other)]
    load_gates(other, folder)
    kept = all(g is u.log_alpha for g, (_, u) in zip(gates, gated_activations(other), strict=True))
    refused = []
    for verb in (bake, revert):
        try:
            verb(model)
        except TypeError as error:
            refused.append(str(error))
    states = {"saved": whole_state(model), "loaded": whole_state(other)}
    return states | {"kept": kept, "refused": refused}


def matched(batches: list[Tensor]) -> Result:
    """Matched and refitted with the batches of this rank alone; one rank's may be no input."""
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    try:
        report = match_targets(model, batches[rank::RANKS], refit=True)
    except Exception as error:
        return {"error": str(error), "state": model.module.state_dict()}
    return {"state": model.module.state_dict(), "r2": [row.r2 for row in report]}
