"""Two processes that train one network: how they start, what they train, on which rows."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW, Optimizer

from transfer_surgery import (
    TransferSchedule,
    bake,
    convert,
    match_targets,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations

GAMMA = 0.3
RANKS = 2
BATCH = 16  # of all ranks and accumulated parts together
PARTS = 2
STEPS = 4

Result = dict[str, Any]
Program = Callable[..., Result]

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=0.02),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gamma": {"gamma": GAMMA},
    "schedule": {"transfer": TransferSchedule(8, start=0)},
    "part by part": {"transfer": TransferSchedule(8, start=0, order="back_to_front", fraction=0.8)},
}


def on_ranks(program: Program, folder: Path, *args: Any) -> list[Result]:
    """Run a program in each of two processes; what it returned there, by rank."""
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(_enter, args=(program, folder, args), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _enter(rank: int, program: Program, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        torch.save(program(*args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # A worker thread of gloo that FSDP keeps alive may abort Python's shutdown.
    os._exit(0)


def network() -> nn.Sequential:
    """Gates per layer, neuron and channel, between 0 and 1; shards of 1 and 5 are uneven."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Sequential(nn.Linear(8, 8), nn.GELU()),
        nn.Linear(8, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )
    granularity = {"1": "layer", "2.*": "neuron", "*": "channel"}
    convert(model, example_input=torch.zeros(2, 6), granularity=granularity, seed=1)
    for _, unit in gated_activations(model):
        nn.init.normal_(unit.log_alpha)
    return model


def fitted_network(baked: bool) -> nn.Module:
    """The network with fitted targets, its gates mixed or, baked, all of them at the target."""
    model = network()
    generator = torch.Generator().manual_seed(7)
    match_targets(model, [torch.randn(256, 6, generator=generator)])
    return bake(swap_targets(model)) if baked else model


def loss(model: nn.Module, step: int, rows: slice = slice(None)) -> Tensor:
    """Of these rows of the step's batch; the gates' noise is that of the step everywhere."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)
    torch.manual_seed(100 + step)
    return nn.functional.mse_loss(model(x[rows]), y[rows])


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """On this rank's rows, in two accumulated parts, of which the last synchronises."""
    size = BATCH // RANKS // PARTS
    for step in steps:
        for part in range(PARTS):
            start = (dist.get_rank() * PARTS + part) * size
            with _synchronising(model, part == PARTS - 1):
                (loss(model, step, slice(start, start + size)) / PARTS).backward()
        optimizer.step()
        optimizer.zero_grad()


def _synchronising(model: Any, wanted: bool) -> Any:
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(wanted)
    elif not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def shard(model: nn.Sequential, policy: MixedPrecisionPolicy | None = None) -> nn.Sequential:
    options = {} if policy is None else {"mp_policy": policy}
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    fully_shard(model[2], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def wrapped(model: nn.Module, optimizer: str, how: str) -> Optimizer:
    return wrap_optimizer(OPTIMIZERS[optimizer](model.parameters()), model, **SETTINGS[how])


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
