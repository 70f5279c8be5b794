"""What keeps a network of quadratic polynomials stable while it is distilled, one by one.

    python benchmarks/polynomial_remedies.py run --cache FOLDER
    python benchmarks/polynomial_remedies.py table

`run` distils the CIFAR-10 ResNet-20 without any ReLU for some steps with each remedy and seed that
has no result yet, and looks at 1,000 training images that were left out. `table` fills a page.
"""

from __future__ import annotations

import copy
import json
import math
import re
import sys
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from markdown_page import fill_blocks, markdown_table
from pretrained import prepared
from pretrained_recipes import Recipe
from pretrained_training import STAGES
from study import BATCH, calibration, machine_note, percent, write_json
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_resnet import trained_resnet

from transfer_surgery import GatedActivation, distill
from transfer_surgery.cli.finetuning.images import MemoryLoader, Unlabelled, load_cifar10
from transfer_surgery.cli.finetuning.training import Machine, predict
from transfer_surgery.matching.distilling import batch_gradients, distillation
from transfer_surgery.matching.distilling.polynomial_range import FittedRanges
from transfer_surgery.units.kernels import formula

HELD_OUT = 1_000
PARTS = 4
PAGE = Path(__file__).parents[1] / "docs" / "swaps.md"
RESULTS = Path(__file__).with_name("results") / "remedies"
app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False)
Folder = Annotated[Path, typer.Option(help="Folder of the JSON files.")]


@dataclass(frozen=True)
class Remedy:
    """What differs from the library's own setting, which is the default here."""

    bound: float = 2.0
    range_weight: float = 0.05
    of_all: bool = False
    clip: float = 2.0
    warmup: float = 0.05
    lr: float = 0.002
    held_norms: bool = False
    features: tuple[str, ...] = STAGES


REMEDIES = {
    "bounds at 2 ranges, penalty": Remedy(),
    "bounds at 2 ranges, penalty on the mean of all inputs": Remedy(
        range_weight=250.0, of_all=True
    ),
    "bounds at 2 ranges, no penalty": Remedy(range_weight=0.0),
    "bounds at 1 range, no penalty": Remedy(bound=1.0, range_weight=0.0),
    "bounds at 3 ranges, no penalty": Remedy(bound=3.0, range_weight=0.0),
    "no bounds, penalty": Remedy(bound=1e30),
    "no bounds, no penalty": Remedy(bound=1e30, range_weight=0.0),
    "penalty ten times as high": Remedy(range_weight=0.5),
    "gradient not clipped": Remedy(clip=1e9),
    "no warm-up": Remedy(warmup=1e-9),
    "learning rate 0.001": Remedy(lr=0.001),
    "learning rate 0.005": Remedy(lr=0.005),
    "batch norms held": Remedy(held_norms=True),
    "only the outputs compared, no layers": Remedy(features=()),
}
"""The first is what the library does. Bounds at another width are measured without the penalty."""


@dataclass
class Result:
    """One remedy and seed: see the head of the table."""

    name: str
    steps: int
    error: float
    overflow: float
    furthest: list[float]
    outside: list[float]
    machine: str
    divergence: float | None = None
    original: float | None = None
    """The error of the original network on the same images."""
    batch: int = 128
    seed: int = 0


@app.command()
def run(
    cache: Annotated[Path, typer.Option(help="Folder that keeps the matched network.")],
    steps: Annotated[int, typer.Option(min=PARTS, help="Training steps.")] = 100,
    batch: Annotated[int, typer.Option(min=2, help="Images of a training step.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each remedy.")] = 3,
    name: Annotated[list[str] | None, typer.Option(help="Only these; several times.")] = None,
    folder: Folder = RESULTS,
) -> None:
    """Measure those that have no file yet for so many steps."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed, (remedy, settings) in product(range(seeds), REMEDIES.items()):
        slug = re.sub(r"[^a-z0-9]+", "-", remedy)
        file = folder / f"{slug}-{steps}x{batch}-seed{seed}.json"
        if not file.exists() and (not name or remedy in name):
            write_json(measured(remedy, settings, steps, batch, seed, cache), file)
            print(file.read_text())


def measured(name: str, remedy: Remedy, steps: int, batch: int, seed: int, cache: Path) -> Result:
    machine = Machine.choose()
    train = load_cifar10(batch_size=batch, device=machine.device).train
    assert isinstance(train, MemoryLoader)
    held_out = MemoryLoader(
        train.images[-HELD_OUT:], train.labels[-HELD_OUT:], BATCH, train.preprocessing
    )
    train.images, train.labels = train.images[:-HELD_OUT], train.labels[:-HELD_OUT]
    teacher = machine.place(trained_resnet(20))
    recipe = Recipe(start="refitted", target="polynomial", seed=seed)
    # Networks matched without the images left out are others than those of pretrained.py.
    own = cache / f"without-{HELD_OUT}"
    model, _ = prepared(recipe, teacher, calibration(train, recipe.images, seed), own)
    model = copy.deepcopy(model)
    for module in model.modules():
        if remedy.held_norms and isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    torch.manual_seed(seed)
    furthest, outside = [0.0] * PARTS, [0.0] * PARTS
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(formula, "_BOUND", remedy.bound))
        for constant in ("range_weight", "clip", "warmup"):
            value = getattr(remedy, constant)
            place = batch_gradients if constant == "range_weight" else distillation
            stack.enter_context(mock.patch.object(place, f"_{constant.upper()}", value))
        if remedy.of_all:
            stack.enter_context(mock.patch.object(FittedRanges, "_largest_distance", distances))
        done = watch(model, stack, steps, furthest, outside)
        try:
            distill(
                model, teacher, Unlabelled(train), steps=steps, loss="kl", lr=remedy.lr,
                features=remedy.features, variation=0.0, progress=lambda now: done.append(now.done),
            )  # fmt: skip
        except ValueError as error:  # what overflows is the start, then
            print(error)
    found = predict(model, held_out, machine)
    overflow = 1 - found.logits.isfinite().all(1).double().mean().item()
    wanted = predict(teacher, held_out, machine)
    divergence = F.kl_div(
        found.logits.log_softmax(1), wanted.logits.log_softmax(1),
        reduction="batchmean", log_target=True,
    ).item()  # fmt: skip
    return Result(
        name, steps, 1 - found.accuracy, overflow, furthest, outside, machine_note(machine, 1),
        divergence if math.isfinite(divergence) else None, 1 - wanted.accuracy, batch, seed,
    )  # fmt: skip


def distances(ranges: FittedRanges, unit: GatedActivation, x: Tensor) -> Tensor:
    """How far all inputs are outside, for a penalty that is their mean."""
    assert unit.fitted is not None
    _, w, c, *_ = unit.fitted.expand(x)
    return ((w * x + c).abs() - 1.0).clamp_min(0.0).flatten()


def watch(
    model: nn.Module, stack: ExitStack, steps: int, furthest: list[float], outside: list[float]
) -> list[int]:
    """Keep the furthest input and the largest share outside of the range of each part of a run.

    Returns:
        A list for the numbers of the steps that are done.
    """
    done = [0]

    def look(unit: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(unit, GatedActivation)
        assert unit.fitted is not None
        if not unit.bounded:
            return
        with torch.no_grad():
            _, w, c, *_ = unit.fitted.expand(args[0])
            v = (w * args[0] + c).abs()
        part = min(done[-1] * PARTS // steps, PARTS - 1)
        furthest[part] = max(furthest[part], v.max().item())
        outside[part] = max(outside[part], (v > 1).double().mean().item())

    for unit in model.modules():
        if isinstance(unit, GatedActivation):
            stack.callback(unit.register_forward_pre_hook(look).remove)
    return done


@app.command()
def table(
    page: Annotated[Path, typer.Option(help="Page to fill.")] = PAGE, folder: Folder = RESULTS
) -> None:
    """Write the table."""
    results = [Result(**json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]
    groups = defaultdict(list)
    for one in results:
        groups[one.steps, one.batch, one.name].append(one)
    head = ["remedy", "steps", "seeds", "held-out error", "divergence", "overflow",
            "furthest input, in ranges", "most outside at a site"]  # fmt: skip
    rows = [
        [
            name, f"{steps} of {batch}", str(len(runs)), percent([one.error for one in runs], 1),
            divergence(runs), percent([one.overflow for one in runs], 1),
            ", ".join(f"{max(one.furthest[i] for one in runs):.3g}" for i in range(PARTS)),
            ", ".join(f"{max(one.outside[i] for one in runs):.2%}" for i in range(PARTS)),
        ]
        for (steps, batch, name), runs in sorted(groups.items(), key=order)
    ]  # fmt: skip
    machines = "; ".join(sorted({one.machine for one in results}))
    text = f"{markdown_table(head, rows)}\n\n{machines}."
    if known := [one.original for one in results if one.original is not None]:
        text += f" The original network has {known[0]:.1%} on these images."
    page.write_text(fill_blocks(page.read_text(), {"remedies": text}))


def order(group: tuple[tuple[int, int, str], list[Result]]) -> tuple[int, int, float]:
    """Short runs first, of these the lowest error first."""
    (steps, batch, _), runs = group
    return steps, batch, mean(one.error for one in runs)


def divergence(runs: list[Result]) -> str:
    """The highest, as one example that nearly overflows counts; none where one has overflown."""
    values = [one.divergence for one in runs]
    return f"{max(v for v in values if v is not None):.3g}" if None not in values else "-"


if __name__ == "__main__":
    app()
