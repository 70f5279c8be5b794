"""What gated activations cost: time and memory beside the network as it was, in one run.

    python benchmarks/speed.py --model resnet18 --model cifar_resnet20 --table speed.md

The page says what the columns mean, see `NOTE`.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from memory import waiting_bytes
from rich.console import Console
from torch import Tensor, nn
from variants import UNITS_COMPILED, inference_networks, new_model, training_networks

from transfer_surgery import GatedActivation, wrap_optimizer
from transfer_surgery.cli.finetuning.training import Machine
from transfer_surgery.units import VARIABLE

console = Console()
NOTE = (
    "All variants of a model take turns, round by round; a ratio is the median over rounds of a "
    "variant's time by that of its baseline in the same round. Memory is what waits for the "
    "backward pass (CUDA: the peak of the allocator), without parameters."
)


@dataclass
class Variant:
    """One way to have a network, and the one that it is compared with."""

    name: str
    baseline: str
    step: Callable[[], None]
    bytes: int
    first: float
    seconds: list[float]


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="A timm model, or cifar_resnet20; several times.")
    ] = None,
    batch_size: int = 8,
    image_size: Annotated[
        int, typer.Option(help="Height and width of the images of timm models.")
    ] = 224,
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    compile: Annotated[bool, typer.Option(help="Measure compiled networks as well.")] = False,
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
    table: Annotated[Path | None, typer.Option(help="Markdown file for the tables.")] = None,
) -> None:
    """Print, and write, ratios of time and memory."""
    torch.set_num_threads(threads)
    machine = Machine.choose(amp=amp)
    parts = [page_head("What gated activations cost", "speed.py", machine, NOTE)]
    for name in model or ["resnet18", "cifar_resnet20"]:
        size = 32 if name == "cifar_resnet20" else image_size
        images = machine.place(torch.randn(batch_size, 3, size, size))
        torch.manual_seed(0)
        original = machine.place(new_model(name))
        for training in (True, False):
            make = training_networks if training else inference_networks
            variants = [
                _variant(title, network, baseline, images, machine, training)
                for title, network, baseline in make(original, images, compile)
            ]
            _take_turns(variants, rounds, machine)
            kind = "training step" if training else "inference"
            parts.append(_section(f"{name}, {kind}, batch {batch_size}", variants, training))
            console.print(parts[-1])
    if table:
        table.write_text("\n".join(parts))


def page_head(title: str, program: str, machine: Machine, note: str) -> str:
    """Title, command, machine, versions and date."""
    where = torch.cuda.get_device_name() if machine.device.type == "cuda" else _cpu_name()
    return (
        f"# {title}\n\n`python benchmarks/{program} {' '.join(sys.argv[1:])}`, {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}. {note}\n"
    )


def _variant(
    name: str,
    network: nn.Module,
    baseline: str,
    images: Tensor,
    machine: Machine,
    training: bool,
) -> Variant:
    network.train(training)
    kernels = "compiled" if name == UNITS_COMPILED else "eager"
    if not training:

        @torch.inference_mode()
        def predict() -> None:
            with machine.autocast():
                network(images)

        predict()
        return Variant(name, baseline, predict, 0, 0.0, [])
    labels = torch.arange(len(images), device=images.device) % 10
    # So small a rate that gates stay in their phase.
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=0.9)
    if any(isinstance(module, GatedActivation) for module in network.modules()):
        wrap_optimizer(optimizer, network, gamma=1e-6)

    def loss() -> Tensor:
        with machine.autocast():
            return F.cross_entropy(network(images).float(), labels)

    def step() -> None:
        os.environ[VARIABLE] = kernels
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    return Variant(name, baseline, step, _bytes(loss, step, machine), first, [])


def _bytes(loss: Callable[[], Tensor], step: Callable[[], None], machine: Machine) -> int:
    if machine.device.type != "cuda":
        return waiting_bytes(loss)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _take_turns(variants: list[Variant], rounds: int, machine: Machine) -> None:
    for _ in range(rounds):
        for variant in variants:
            wait(machine)
            start = time.perf_counter()
            variant.step()
            wait(machine)
            variant.seconds.append(time.perf_counter() - start)


def wait(machine: Machine) -> None:
    """Until the device is done."""
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


def _section(title: str, variants: list[Variant], training: bool) -> str:
    named = {variant.name: variant for variant in variants}
    lines = [
        f"## {title}\n",
        "| network | beside | time | middle half | memory |",
        "|---" * 5 + "|",
    ]
    for variant in variants:
        base = named[variant.baseline]
        ratios = [a / b for a, b in zip(variant.seconds, base.seconds, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        memory = f"{variant.bytes / base.bytes:.3f}" if training and base.bytes else "-"
        lines.append(
            f"| {variant.name} | {base.name} | {median(ratios):.3f} | {low:.3f} to {high:.3f} "
            f"| {memory} |"
        )
    note = f"\nThe original takes {1000 * median(named['original'].seconds):.1f} ms."
    if (compiled := named.get(UNITS_COMPILED)) is not None:
        note += f" The first step with compiled units takes {compiled.first:.1f} s."
    return "\n".join([*lines, f"{note}\n"])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    typer.run(main)
