"""What the gates' bookkeeping costs: launches per training step, and its share of a step's time.

    python benchmarks/overhead.py --model resnet50 --table overhead.md

Sampling happens in each forward pass, and risk or projection once per optimizer step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from memory import Launches
from rich.console import Console
from speed import page_head, wait
from torch import Tensor, nn
from variants import new_model

from transfer_surgery import TransferSchedule, convert, wrap_optimizer
from transfer_surgery.cli.finetuning.training import Machine
from transfer_surgery.transfer.controllers import Projection
from transfer_surgery.transfer.risk import add_risk_gradient
from transfer_surgery.units import gated_activations

console = Console()
NOTE = (
    "Launches are calls of tensor operators, views left out; on a GPU nearly all start a kernel. "
    "Each share is the median time of the work alone by that of a whole step of the converted "
    "network with mixed gates."
)


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="A timm model, or cifar_resnet20; several times.")
    ] = None,
    batch_size: int = 8,
    image_size: Annotated[
        int, typer.Option(help="Height and width of the images of timm models.")
    ] = 224,
    rounds: Annotated[int, typer.Option(min=3)] = 7,
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
    table: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
) -> None:
    """Print, and write, launches and shares."""
    torch.set_num_threads(threads)
    machine = Machine.choose(amp=amp)
    parts = [page_head("What the gates' bookkeeping costs", "overhead.py", machine, NOTE)]
    for name in model or ["resnet50"]:
        size = 32 if name == "cifar_resnet20" else image_size
        images = machine.place(torch.randn(batch_size, 3, size, size))
        parts.append(_section(name, machine.place(new_model(name)), images, rounds, machine))
        console.print(parts[-1])
    if table:
        table.write_text("\n".join(parts))


def _section(name: str, model: nn.Module, images: Tensor, rounds: int, machine: Machine) -> str:
    gated = convert(copy.deepcopy(model), "sin", example_input=images[:2])
    units = [unit for _, unit in gated_activations(gated)]
    for unit in units:
        unit.log_alpha.data.normal_()
    steps = {
        "original": _step(model, images, machine),
        "gamma": _step(copy.deepcopy(gated), images, machine, gamma=1e-6),
        "schedule": _step(
            copy.deepcopy(gated), images, machine, transfer=TransferSchedule(10**6, start=0)
        ),
    }
    lines = ["| step | forward | backward | optimizer |", "|---|---|---|---|"]
    for kind, step in steps.items():
        step()
        step()  # the second step of a schedule is like all that follow
        counts = [str(count) for count in step(count=True)]
        lines.append(f"| {kind} | {' | '.join(counts)} |")
    whole = _seconds(steps["schedule"], rounds, machine)
    projection = Projection(dict(gated_activations(gated)), TransferSchedule(10**6, start=0))
    numbers = iter(range(5 * 10**5, 10**6))
    works: dict[str, Callable[[], Any]] = {
        "sampling, forward and backward": lambda: _sample(units, len(images)),
        "risk": lambda: add_risk_gradient(units, 1e-6, "sum"),
        "projection": lambda: projection.follow(next(numbers), None),
    }
    lines += ["", "| work | share of a step |", "|---|---|"]
    for work, function in works.items():
        lines.append(f"| {work} | {_seconds(function, 5 * rounds, machine) / whole:.2%} |")
    size = f"batch {len(images)}, {images.shape[-1]} px, {len(units)} sites"
    return "\n".join([f"## {name}, {size}\n", *lines, f"\nA step takes {1000 * whole:.0f} ms.\n"])


def _step(network: nn.Module, images: Tensor, machine: Machine, **how: Any) -> Callable[..., Any]:
    network.train()
    labels = torch.arange(len(images), device=images.device) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=0.9)
    if how:
        wrap_optimizer(optimizer, network, **how)

    def step(count: bool = False) -> list[int]:
        optimizer.zero_grad()
        counts = []
        with Launches(count) as launches:
            with machine.autocast():
                loss = F.cross_entropy(network(images).float(), labels)
            counts.append(launches.number)
            loss.backward()
            counts.append(launches.number - sum(counts))
            optimizer.step()
            counts.append(launches.number - sum(counts))
        return counts

    return step


def _sample(units: list[Any], batch: int) -> None:
    samples = [unit.gate.sample(batch) for unit in units]
    torch.autograd.grad(
        samples, [u.log_alpha for u in units], [torch.ones_like(z) for z in samples]
    )


def _seconds(work: Callable[[], Any], rounds: int, machine: Machine) -> float:
    work()
    times = []
    for _ in range(rounds):
        wait(machine)
        start = time.perf_counter()
        work()
        wait(machine)
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    typer.run(main)
