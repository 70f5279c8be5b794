"""The study of matched targets: sinusoidal networks from trained ones, recipe by recipe.

    python benchmarks/pretrained.py run --start refitted
    python benchmarks/pretrained.py grid --epochs 1 | xargs -P2 -I{} sh -c '{}'
    python benchmarks/pretrained.py grid --depth 56 --best --epochs 6 | xargs -P2 -I{} sh -c '{}'
    python benchmarks/pretrained.py table
    python benchmarks/pretrained.py swaps --epochs 1 | xargs -P2 -I{} sh -c '{}'

`run` measures one recipe with one seed and writes a JSON file. `grid` prints the commands of the
recipes that have no file yet, `swaps` those of targets other than sinusoids. The files are in
benchmarks/results/pretrained and benchmarks/results/swaps. `table` makes the tables of
docs/pretrained.md from them, and `table --page docs/swaps.md` those of the other page. The folder
named by TRANSFER_SURGERY_DATA must have CIFAR-10 and the trained ResNets.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_resnet import trained_resnet
from pretrained_recipes import Recipe, best_recipes, recipes, swap_recipes
from pretrained_table import Result, fill, read_results
from pretrained_training import train
from study import BATCH, calibration, machine_note, print_commands, write_json

from transfer_surgery import HardConcrete, Line, convert, match_targets, swap_targets
from transfer_surgery.cli.finetuning.images import load_cifar10
from transfer_surgery.cli.finetuning.training import Machine, predict

PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"
RESULTS = Path(__file__).with_name("results")
console = Console()
app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False)
Folder = Annotated[Path, typer.Option(help="Folder of the JSON files.")]


@app.command()
def run(
    depth: Annotated[int, typer.Option(help="Depth of the ResNet: 20, 32, 44 or 56.")] = 20,
    start: Annotated[
        str, typer.Option(help="Start: relu (not converted), plain, matched, refitted.")
    ] = "matched",
    weights: Annotated[
        str, typer.Option(help="What weights the errors of the fits: none, gradient.")
    ] = "none",
    images: Annotated[
        int, typer.Option(min=1, help="Number of unlabelled images for matching.")
    ] = 1024,
    transfer: Annotated[
        str, typer.Option(help="How gates move: hard (at once), soft, line.")
    ] = "hard",
    noise: Annotated[
        str, typer.Option(help="Noise of soft gates: batch, example, none.")
    ] = "batch",
    order: Annotated[
        str, typer.Option(help="Who goes first: joint, front_to_back, sensitivity.")
    ] = "joint",
    lesson: Annotated[
        str, typer.Option(help="What trains: labels, teacher (no labels), both.")
    ] = "labels",
    steps: Annotated[
        int, typer.Option(min=0, help="Training steps; an epoch has 390 of 128 images.")
    ] = 0,
    opt: Annotated[
        str, typer.Option(help="Optimizer: sgd, adamw (for the teacher's lesson).")
    ] = "sgd",
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.02,
    seed: int = 0,
    target: Annotated[
        str, typer.Option(help="Activation to change to: sin, snake, polynomial(degree=4), ...")
    ] = "sin",
    keep: Annotated[float, typer.Option(help="Share of neurons that stay ReLUs.")] = 0.0,
    batch: Annotated[int, typer.Option(min=2, help="Images of a training step.")] = BATCH,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
    compiled: Annotated[bool, typer.Option(help="Train with torch.compile.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps matched networks.")] = None,
    folder: Folder = RESULTS / "pretrained",
) -> None:
    """One recipe."""
    recipe = Recipe(
        depth, start, weights, images, transfer, noise, order, lesson, steps, opt, lr, seed,
        target, keep, batch,
    )  # fmt: skip
    torch.set_num_threads(threads)
    result = study(recipe, threads, compiled, cache)
    write_json(result, folder / f"{recipe.name}.json")
    console.print(f"{recipe.name}: {result.error:.2%}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def grid(
    context: typer.Context,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of 390 steps each.")] = 1,
    seeds: Annotated[int, typer.Option(help="Number of seeds of each recipe.")] = 1,
    depth: int = 20,
    best: Annotated[
        bool, typer.Option("--best", help="Only the best recipe and the ReLU baseline.")
    ] = False,
    folder: Folder = RESULTS / "pretrained",
) -> None:
    """Print the commands of recipes without a file, for ``xargs -P2 -I{} sh -c '{}'``.

    Other options are passed on, such as --compiled and --cache.
    """
    chosen = best_recipes if best else recipes
    print_commands(chosen(depth, epochs, seeds), folder, context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def swaps(
    context: typer.Context,
    epochs: Annotated[int, typer.Option(help="Epochs: 0 or 1.")] = 1,
    folder: Folder = RESULTS / "swaps",
) -> None:
    """The same for other targets: snake, and polynomials with budgets of ReLUs."""
    print_commands(swap_recipes(epochs), folder, context.args)


@app.command()
def table(
    page: Annotated[
        Path, typer.Option(help="Page to fill: docs/pretrained.md or docs/swaps.md.")
    ] = PAGE,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder of the JSON files; by default that of the page's name."),
    ] = None,
) -> None:
    """Make the tables of a page of the documentation from the results."""
    results = read_results(folder or RESULTS / page.stem)
    page.write_text(fill(page.read_text(), results))


def study(recipe: Recipe, threads: int, compiled: bool, cache: Path | None) -> Result:
    machine = Machine.choose()
    data = load_cifar10(batch_size=recipe.batch, device=machine.device)
    teacher = machine.place(trained_resnet(recipe.depth))
    torch.manual_seed(recipe.seed)
    batches = calibration(data.train, recipe.images, recipe.seed)
    model, match_seconds = prepared(recipe, teacher, batches, cache)
    begun = time.perf_counter()
    losses, transferred = train(recipe, model, teacher, batches, data, compiled)
    done = time.perf_counter()
    how = ", compiled" if compiled and recipe.steps and recipe.lesson != "teacher" else ""
    return Result(
        recipe,
        error=1 - predict(model, data.test, machine).accuracy,
        transferred=transferred,
        match_seconds=round(match_seconds, 1),
        train_seconds=round(done - begun, 1),
        losses=[round(x, 4) if math.isfinite(x) else None for x in in_parts(losses, 20)],
        machine=f"{machine_note(machine, threads)}{how}",
    )


def prepared(
    recipe: Recipe, teacher: nn.Module, batches: list[Tensor], cache: Path | None
) -> tuple[nn.Module, float]:
    """The network before any training, and the seconds that matching took, maybe earlier."""
    untrained = replace(recipe, steps=0, lesson="labels", opt="sgd", lr=0.02, batch=BATCH)
    file = None if cache is None else cache / f"{untrained.name}.pt"
    if file is not None and file.exists():
        model, seconds = torch.load(file, weights_only=False)
        return model, seconds
    begun = time.perf_counter()
    model = prepare(recipe, teacher, batches)
    seconds = time.perf_counter() - begun
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save((model, seconds), file)
    return model, seconds


def prepare(recipe: Recipe, teacher: nn.Module, batches: list[Tensor]) -> nn.Module:
    model = copy.deepcopy(teacher)
    if recipe.start == "relu":
        return model
    gate = Line() if recipe.transfer == "line" else HardConcrete(noise=recipe.noise)
    convert(model, recipe.target, example_input=batches[0][:2], gate=gate)
    weights = None if recipe.weights == "none" else recipe.weights
    if recipe.keep:
        if recipe.start != "plain":
            match_targets(model, batches, weights=weights, logits=True)
        swap_targets(model, keep=recipe.keep, batches=batches, logits=True)
    if recipe.start != "plain":
        refit = recipe.start == "refitted"
        match_targets(model, batches, refit=refit, weights=weights, logits=True)
    if recipe.transfer == "hard" and not recipe.keep:
        swap_targets(model)
    return model


def in_parts(values: list[float], parts: int) -> list[float]:
    """Means of so many parts of equal length, or all values where there are fewer."""
    parts = min(parts, len(values))
    edges = [len(values) * i // parts for i in range(parts + 1)] if parts else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


if __name__ == "__main__":
    app()
