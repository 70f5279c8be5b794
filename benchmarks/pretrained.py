"""A sinusoidal network from a trained ReLU network, without labels: what each step is worth.

    python benchmarks/pretrained.py --depth 20 --depth 56 --table docs/pretrained.md

All activations of the trained CIFAR-10 ResNets are replaced. Matching sees some training images
without crops and flips, distillation sees all of them with; neither sees a label.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_resnet import ResNet
from image_data import ImageData, MemoryLoader, load_cifar10
from training import Machine, predict

from transfer_surgery import bake, convert, distill, match_targets, swap_targets

console = Console()
BATCH = 128


@dataclass(frozen=True)
class Row:
    """One way to replace the activations."""

    name: str
    error: float
    seconds: float | None


def main(
    depth: Annotated[list[int] | None, typer.Option(help="20, 32, 44 or 56; repeat it.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Unlabelled images for matching.")] = 512,
    steps: Annotated[list[int] | None, typer.Option(help="Of distillation; repeat it.")] = None,
    lr: Annotated[float, typer.Option(help="Highest learning rate of distillation.")] = 0.02,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's.")] = None,
    seed: int = 0,
    table: Annotated[Path | None, typer.Option(help="Markdown file for the tables.")] = None,
) -> None:
    """Print, and write, the test error and the time of each way."""
    if threads:
        torch.set_num_threads(threads)
    machine = Machine.choose()
    data = load_cifar10(batch_size=BATCH, device=machine.device)
    sections = []
    for number in depth or [20]:
        rows = list(study(number, data, machine, images, steps or [], lr, seed))
        sections.append(markdown(number, rows))
        console.print(f"\n{sections[-1]}\n")
    if table:
        where = torch.cuda.get_device_name() if machine.device.type == "cuda" else "CPU"
        command = " ".join(["python benchmarks/pretrained.py", *sys.argv[1:]])
        head = (
            f"`{command}`, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}."
        )
        table.write_text("\n\n".join([table_head(), head, *sections]) + "\n")


def study(
    depth: int,
    data: ImageData,
    machine: Machine,
    images: int,
    steps: list[int],
    lr: float,
    seed: int,
) -> Iterator[Row]:
    """A row for each way, from the trained network on."""
    folder = os.environ.get("TRANSFER_SURGERY_DATA")
    if not folder:
        raise typer.BadParameter("TRANSFER_SURGERY_DATA: name the folder that holds weights/.")
    teacher = ResNet(depth)
    teacher.load_state_dict(
        load_file(Path(folder) / "weights" / f"cifar10_resnet{depth}.safetensors")
    )
    machine.place(teacher)
    batches = calibration(data, images, seed)

    def error(model: nn.Module) -> float:
        return 1 - predict(model, data.test, machine).accuracy

    def row(name: str, work: Callable[[nn.Module], object]) -> Row:
        model = convert(copy.deepcopy(teacher), "sin", example_input=batches[0][:2])
        begun = time.perf_counter()
        work(model)
        seconds = time.perf_counter() - begun
        swap_targets(model)
        result = Row(name, error(bake(model)), seconds)
        console.print(f"ResNet-{depth}, {name}: {result.error:.2%} ({seconds:.0f} s)")
        return result

    yield Row("ReLU, as trained", error(teacher), None)
    yield row("plain sine", lambda model: None)
    yield row("matched, symmetric", lambda m: match_targets(m, batches, symmetric=True))
    yield row("matched", lambda m: match_targets(m, batches))
    yield row("matched, layers refitted", lambda m: match_targets(m, batches, refit=True))
    for number in steps:
        torch.manual_seed(seed)
        yield row(
            f"matched, layers refitted, distilled for {number} steps",
            lambda m, number=number: (
                match_targets(m, batches, refit=True),
                distill(m, teacher, Unlabelled(data.train), steps=number, lr=lr),
            ),
        )


def calibration(data: ImageData, number: int, seed: int) -> list[Tensor]:
    """Training images as they are, without crops, flips and labels."""
    train = data.train
    assert isinstance(train, MemoryLoader)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[:number].to(train.images.device)
    plain = MemoryLoader(train.images[chosen], train.labels[chosen], BATCH, train.look)
    return [images for images, _ in plain]


@dataclass(frozen=True)
class Unlabelled:
    """A loader's inputs without their labels."""

    loader: object

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.loader:  # type: ignore[attr-defined]
            yield images


def table_head() -> str:
    """What the tables are."""
    return (
        "# Sinusoidal networks from trained ones, without labels\n\n"
        "CIFAR-10 ResNets (He et al. 2016) with every activation replaced, baked: error on\n"
        "the 10,000 test images, and the seconds of matching and distillation. `plain sine` is\n"
        "the hard swap without any fitting. One seed."
    )


def markdown(depth: int, rows: list[Row]) -> str:
    lines = [f"## ResNet-{depth}", "", "| network | test error | seconds |", "|---|---|---|"]
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append(f"| {row.name} | {row.error:.2%} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
