"""Train in several processes, with DDP or FSDP2. You may stop it: it goes on where it was.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --fsdp

Convert first, then wrap the model, then make and wrap the optimizer. After that the loop is the
usual one: every rank adds the same risk and moves the gates by the same offset.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from transfer_surgery import TransferSchedule, bake, convert, report, wrap_optimizer
from transfer_surgery.cli.finetuning.images import MemoryLoader, load_digits


def main() -> None:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    data = load_digits(batch_size=args.batch_size, device=device)
    steps = len(data.train) // dist.get_world_size()

    model = network(args).to(device)
    trained: nn.Module = shard(model) if args.fsdp else DistributedDataParallel(model)
    optimizer = AdamW(trained.parameters(), lr=args.lr)
    schedule = TransferSchedule(args.epochs * steps, order=args.order)
    wrap_optimizer(optimizer, trained, transfer=schedule)
    first = load(trained, optimizer, args.checkpoint)
    for epoch in range(first, args.epochs):
        torch.manual_seed(epoch * dist.get_world_size() + dist.get_rank())
        trained.train()
        for images, labels in own(data.train, epoch, steps):
            F.cross_entropy(trained(images), labels).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        transferred = report(trained).total.transferred  # on every rank: sharded gates are gathered
        say(f"epoch {epoch + 1}: {transferred:.1%} transferred")
        save(trained, optimizer, args.checkpoint, epoch + 1)
    finish(trained, args, data.test)
    dist.barrier()  # rank 0 bakes and tests meanwhile
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--model", default="test_resnet", help="name of a timm model")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=60, help="batch size of each process")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--order", default="joint", help="order of TransferSchedule")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/distributed"))
    return parser.parse_args()


def network(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)  # the same weights and gates on every rank
    return convert(timm.create_model(args.model, num_classes=10, in_chans=1))


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: each stage gathers its parameters, gates among them, when it runs."""
    for child in model.children():
        if isinstance(child, nn.Sequential) and any(True for _ in child.parameters()):
            fully_shard(child)
    return fully_shard(model)


def own(loader: Any, epoch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches: every rank shuffles alike and takes another one of each round."""
    with torch.random.fork_rng():
        torch.manual_seed(epoch)
        batches = list(loader)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    yield from batches[rank : steps * ranks : ranks]


def save(model: nn.Module, optimizer: Optimizer, folder: Path, epoch: int) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "epoch": epoch}
    dcp.save(state, checkpoint_id=folder / f"epoch{epoch}")
    if dist.get_rank() == 0:  # the name of a whole checkpoint, once it is one
        (folder / "latest.tmp").write_text(str(epoch))
        (folder / "latest.tmp").replace(folder / "latest")


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> int:
    """Number of epochs that the latest checkpoint has behind it; 0 where there is none."""
    latest = folder / "latest"
    dist.barrier()
    if not latest.exists():
        return 0
    epoch = int(latest.read_text())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / f"epoch{epoch}")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    say(f"resumed after epoch {epoch}")
    return epoch


def finish(trained: nn.Module, args: argparse.Namespace, test: MemoryLoader) -> None:
    """Rank 0 bakes a model that is whole, and tests it."""
    state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() > 0:
        return
    model = network(args).to(test.preprocessing.device)
    model.load_state_dict(state)
    bake(model).eval()
    with torch.inference_mode():
        right = torch.cat([model(x).argmax(1) == y for x, y in test])
    say(f"baked: test accuracy {right.double().mean():.2%}")
    torch.save(model, args.checkpoint / "baked.pt")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
    # FSDP keeps gloo's worker threads alive after its group is destroyed; now and then one of them
    # aborts the process while Python shuts down (seen with torch 2.15). All is written by now.
    os._exit(0)
