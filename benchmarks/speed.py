"""What gated activations cost: time and memory beside the network as it was, in one run.

    python benchmarks/speed.py --model resnet18 --model cifar_resnet20 --table docs/performance.md

What the columns mean is said in the page, see `NOTE`.
"""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from memory import waiting_bytes
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_resnet import ResNet
from training import Machine

from transfer_surgery import GatedActivation, bake, convert, wrap_optimizer
from transfer_surgery.surgery import swap_children
from transfer_surgery.unit import gated_activations

console = Console()
NOTE = (
    "All variants of a model take turns, round by round; a ratio is the median over rounds of a "
    "variant's time by that of its baseline in the same round. Memory is what waits for the "
    "backward pass (CUDA: the peak of the allocator), without parameters."
)
PHASES = {"all gates 1": (20.0, 0.0), "mixed gates": (0.0, 1.0), "all gates 0": (-20.0, 0.0)}


class NaiveGate(nn.Module):
    """What one would write: both branches, and the gate of Eq. 15, in plain torch."""

    def __init__(self, unit: GatedActivation) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(unit.log_alpha.detach().clone())
        self.source = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[unit.source.name]
        self.axis = unit.channel_axis

    def forward(self, x: Tensor) -> Tensor:
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        logits = (u.log() - (1 - u).log() + self.log_alpha) / (2 / 3)
        z = (logits.sigmoid() * 1.2 - 0.1).clamp(0, 1)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        z = z.view(shape)
        return z * self.source(x) + (1 - z) * torch.sin(x)


@dataclass
class Variant:
    """One way to have a network, and the one that it is compared with."""

    name: str
    baseline: str
    step: Callable[[], None]
    bytes: int
    seconds: list[float]


def main(
    model: Annotated[list[str] | None, typer.Option(help="timm's, or cifar_resnet20.")] = None,
    batch_size: int = 8,
    image_size: Annotated[int, typer.Option(help="Of timm models.")] = 224,
    rounds: Annotated[int, typer.Option(min=3)] = 15,
    compile: Annotated[bool, typer.Option(help="Compiled variants as well.")] = False,
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 2,
    table: Annotated[Path | None, typer.Option(help="Markdown file for the tables.")] = None,
) -> None:
    """Print, and write, ratios of time and memory."""
    torch.set_num_threads(threads)
    machine = Machine.choose(amp=amp)
    parts = [page_head("What gated activations cost", "speed.py", machine, NOTE)]
    for name in model or ["resnet18", "cifar_resnet20"]:
        size = 32 if name == "cifar_resnet20" else image_size
        images = machine.place(torch.randn(batch_size, 3, size, size))
        for training in (True, False):
            variants = list(_variants(name, images, machine, training, compile))
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


def new_model(name: str) -> nn.Module:
    """A timm model, or ``cifar_resnet20``, with random weights."""
    return ResNet(20) if name == "cifar_resnet20" else timm.create_model(name, num_classes=10)


def _variants(
    name: str, images: Tensor, machine: Machine, training: bool, compiled: bool
) -> Iterator[Variant]:
    torch.manual_seed(0)
    model = machine.place(new_model(name))

    def converted(phase: str, **options: Any) -> nn.Module:
        result = convert(copy.deepcopy(model), "sin", example_input=images[:2], **options)
        mean, spread = PHASES[phase]
        for _, unit in gated_activations(result):
            unit.log_alpha.data.normal_(mean, spread) if spread else unit.log_alpha.data.fill_(mean)
        return result

    def variant(name: str, network: nn.Module, baseline: str = "original") -> Variant:
        return _variant(name, baseline, network, images, machine, training)

    yield variant("original", copy.deepcopy(model))
    if compiled:
        yield variant("original, compiled", torch.compile(copy.deepcopy(model)))
    yield variant("plain sine", bake(converted("all gates 0")))
    if not training:
        yield variant("baked, all gates 1", bake(converted("all gates 1")))
        yield variant("baked, all gates 0", bake(converted("all gates 0")), "plain sine")
        yield variant("baked, mixed gates", bake(converted("mixed gates")))
        return
    for phase in PHASES:
        baseline = "plain sine" if phase == "all gates 0" else "original"
        yield variant(f"gated, {phase}", converted(phase), baseline)
        recomputing = converted(phase, recompute=True)
        yield variant(f"gated, {phase}, recompute", recomputing, baseline)
    yield variant("naive code, mixed gates", _naive(converted("mixed gates")))
    if compiled:
        network = torch.compile(converted("mixed gates"))
        yield variant("gated, mixed gates, compiled", network, "original, compiled")


def _naive(model: nn.Module) -> nn.Module:
    swap_children(model, {unit: NaiveGate(unit) for _, unit in gated_activations(model)})
    return model


def _variant(
    name: str,
    baseline: str,
    network: nn.Module,
    images: Tensor,
    machine: Machine,
    training: bool,
) -> Variant:
    network.train(training)
    if not training:

        @torch.inference_mode()
        def predict() -> None:
            with machine.autocast():
                network(images)

        predict()
        return Variant(name, baseline, predict, 0, [])
    labels = torch.arange(len(images), device=images.device) % 10
    # So small a rate that gates stay in their phase.
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=0.9)
    if any(isinstance(module, GatedActivation) for module in network.modules()):
        wrap_optimizer(optimizer, network, gamma=1e-6)

    def loss() -> Tensor:
        with machine.autocast():
            return F.cross_entropy(network(images).float(), labels)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step()
    return Variant(name, baseline, step, _bytes(loss, step, machine), [])


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
    seconds = median(named["original"].seconds)
    return "\n".join([*lines, f"\nThe original takes {1000 * seconds:.1f} ms.\n"])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    typer.run(main)
