"""Everyday swaps: SiLU to hardswish, GELU to ReLU, tanh to hardtanh; sines, polynomials too.

    python benchmarks/everyday_swaps.py run silu-hardswish --seed 0
    python benchmarks/everyday_swaps.py table

`run` trains a small network on MNIST, swaps its activations in several ways, fine-tunes each (or
distils it: polynomials), and writes a JSON file to benchmarks/results/everyday. `table` puts the
tables into docs/everyday.md. The folder named by TRANSFER_SURGERY_DATA must have MNIST.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from everyday_table import PAGE, RESULTS, STARTS, Result, Row, fill, read_results
from rich.console import Console
from sparsity import share_of_zeros
from study import (
    BATCH,
    changed_answers,
    machine_note,
    swapped,
    train_with_labels,
    write_json,
)
from torch import nn
from torchvision.datasets import MNIST

from transfer_surgery import distill
from transfer_surgery.cli.finetuning.images import MemoryLoader, Preprocessing, Unlabelled
from transfer_surgery.cli.finetuning.training import Machine, predict

TRAIN_LR, TUNE_LR, DISTILL_LR = 4e-3, 2e-4, 2e-3
console = Console()
app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False)
Folder = Annotated[Path, typer.Option(help="Folder of the JSON files.")]


def lenet() -> nn.Module:
    """LeNet-5 as it is taught, all tanh."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def of_timm(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, in_chans=1, num_classes=10, **kwargs)


NETWORKS = {
    "silu-hardswish": lambda: of_timm("test_efficientnet"),
    # With layer scales that start at 1e-6 no swap matters after so short a training.
    "gelu-relu": lambda: of_timm("test_convnext", ls_init_value=1.0),
    "tanh-hardtanh": lenet,
    "gelu-sin-vit": lambda: of_timm("test_vit", img_size=32, patch_size=4),
    "gelu-sin-convnext": lambda: of_timm("test_convnext", ls_init_value=1.0),
    "gelu-polynomial-vit": lambda: of_timm("test_vit", img_size=32, patch_size=4),
}


@app.command()
def run(
    swap: Annotated[str, typer.Argument(help=", ".join(NETWORKS))],
    seed: int = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps; an epoch has 468.")] = 936,
    tune_steps: Annotated[int, typer.Option(min=1, help="Fine-tuning steps.")] = 150,
    images: Annotated[
        int, typer.Option(min=1, help="Number of unlabelled images for matching.")
    ] = 512,
    limit: Annotated[int | None, typer.Option(help="Use only this many images of MNIST.")] = None,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 1,
    folder: Folder = RESULTS,
) -> None:
    """One swap and one seed, in all ways."""
    if swap not in NETWORKS:
        raise typer.BadParameter(f"{swap}: use one of {', '.join(NETWORKS)}.")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    machine = Machine.choose()
    train_images, test_images = mnist(machine, limit)
    teacher = machine.place(NETWORKS[swap]())
    train_with_labels(teacher, train_images, steps, TRAIN_LR)
    batches = [x for x, _ in train_images][: -(-images // BATCH)]
    some = [x for x, _ in test_images][:8]
    original = predict(teacher, test_images, machine)
    rows = []

    def teach(student: nn.Module) -> None:
        distill(
            student, teacher, Unlabelled(train_images), steps=tune_steps, loss="kl", lr=DISTILL_LR,
            variation=0.0, progress=False,
        )  # fmt: skip

    for start in STARTS:
        begun = time.perf_counter()
        source, target = swap.split("-")[:2]
        model, left = swapped(teacher, source, target, start, batches)
        seconds = time.perf_counter() - begun
        before = predict(model, test_images, machine)
        zeros = share_of_zeros(model, some)
        torch.manual_seed(seed)  # the same batches for each start
        if start in ("matched", "refitted") and target == "polynomial":
            # Training after `bake` has neither bounds nor the penalty: it would overflow.
            model, left = swapped(teacher, source, target, start, batches, teach=teach)
        else:
            train_with_labels(model, train_images, tune_steps, TUNE_LR)
        after = predict(model, test_images, machine)
        row = Row(
            start,
            error=1 - before.accuracy,
            changed=changed_answers(before, original),
            zeros=zeros,
            tuned_error=1 - after.accuracy,
            tuned_zeros=share_of_zeros(model, some),
            left=left,
            seconds=round(seconds, 1),
        )
        console.print(f"{swap} {start}: {row.error:.2%}, fine-tuned {row.tuned_error:.2%}")
        rows.append(row)
    label = machine_note(machine, threads)
    result = Result(swap, seed, steps, tune_steps, images, rows, label)
    write_json(result, folder / f"{swap}-seed{seed}.json")


@app.command()
def table(
    page: Annotated[Path, typer.Option(help="Markdown page whose tables are made anew.")] = PAGE,
    folder: Folder = RESULTS,
) -> None:
    """Make the tables of docs/everyday.md from the results."""
    page.write_text(fill(page.read_text(), read_results(folder)))


def mnist(machine: Machine, limit: int | None) -> tuple[MemoryLoader, MemoryLoader]:
    """Padded to 32x32, as for LeNet-5."""
    folder = os.environ.get("TRANSFER_SURGERY_DATA")
    preprocessing = Preprocessing(machine.device, 32, mean=(0.1307,), std=(0.3081,))
    loaders = []
    for training in (True, False):
        data = MNIST(folder or ".data", train=training, download=not folder)
        images = F.pad(data.data[:limit, None], (2,) * 4)
        loaders.append(MemoryLoader(images, data.targets[:limit], BATCH, preprocessing, training))
    return loaders[0], loaders[1]


if __name__ == "__main__":
    app()
