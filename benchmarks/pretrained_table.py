"""The results of the study of matched targets, and the page made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pretrained_recipes import EPOCH, Recipe

__all__ = ["Result", "read_results", "write_table"]

SINUSOIDS = """# Sinusoidal networks from trained ones

CIFAR-10 ResNets (He et al. 2016, `../shared/data`) with every activation replaced by a sinusoid,
baked.
"""
SWAPS = """# Other swaps

The CIFAR-10 ResNet-20 with its ReLUs replaced by other functions than sinusoids, baked: as in
[pretrained.md](pretrained.md), by the same program with `--target` and `--keep`. *keep*: share of
the neurons that stay ReLUs, chosen by `swap_targets(keep=...)`; the others are matched again around
them. A polynomial is one of degree 2.
"""
ABOUT = """
Written by `python benchmarks/pretrained.py table --folder {folder}` from the files in
`docs/{name}/`, one per run of `python benchmarks/pretrained.py run ...`.

Starts: *plain*, the target as it is; *symmetric*, `a*f(w*x + c) + b` fitted to what the source
makes of the same inputs; *matched*, fitted to the original network; *refitted*, matched and the
layers behind each site refitted; *relu*, the original network, fine-tuned with the same settings.
Lessons: *labels*; *teacher*, the original network's answers and features and no labels (`distill`);
*both*, labels and answers. Batches of 128 with crops and flips, cosine schedule, gradient norm
clipped at 2; weight decay 1e-4 where there are labels. Settings: optimizer and highest learning
rate. Errors are those of the 10,000 test images at the end, whose standard error is about 0.3
points; with several seeds mean and standard deviation, and each below. Recipes and their settings
were compared on these images, no others were held out: the best of many rows is a little too good.
Highest loss: of the twentieth of the training in which the cross entropy is worst; it says how deep
the valley is through which a transfer goes; *diverged*: the loss was not finite, which ended the
training.
Minutes are of a machine that did other work at the same time, often; those of
matching are of the run that put the network into `--cache`, maybe with another number of threads.
"""


@dataclass(frozen=True)
class Result:
    """What became of it: `error` and `transferred` as shares, `losses` as means of parts.

    A loss that is not finite, where the training stops, is None.
    """

    recipe: Recipe
    error: float
    transferred: float
    match_seconds: float
    train_seconds: float
    losses: Sequence[float | None]
    machine: str


def read_results(folder: Path) -> list[Result]:
    """All results of a folder."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [Result(**{**values, "recipe": Recipe(**values["recipe"])}) for values in found]


def write_table(results: Iterable[Result], name: str = "pretrained") -> str:
    """The page: a section per network and number of steps, the seeds of a recipe in one row.

    Args:
        results: of all runs.
        name: of their folder in docs.
    """
    sections: dict[tuple[int, str, int], dict[Recipe, list[Result]]] = {}
    for result in results:
        recipe = result.recipe
        section = sections.setdefault((recipe.depth, recipe.target, recipe.steps), {})
        section.setdefault(Recipe(**{**vars(recipe), "seed": 0}), []).append(result)
    head = SINUSOIDS if name == "pretrained" else SWAPS
    parts = [head + ABOUT.format(folder=f"docs/{name}", name=name)]
    for (depth, target, steps), rows in sorted(sections.items()):
        what = "" if target == "sin" else f", {target}"
        parts.append(f"## ResNet-{depth}{what}, {_budget(steps)}\n")
        head = [
            "start",
            "transfer",
            "lesson",
            "settings",
            "error",
            "highest loss",
            "transferred",
            "matching",
            "training",
        ]
        parts += [_line(head), _line(["---"] * len(head))]
        for recipe, seeds in sorted(rows.items(), key=lambda row: _mean(row[1])):
            parts.append(_line(_cells(recipe, seeds)))
        for recipe, seeds in rows.items():
            if len(seeds) > 1:  # a mean of 10 % and 88 % would say nothing
                parts.append(f"\n`{recipe.name}` and on: {_listed(seeds)}.")
        machines = sorted({r.machine for several in rows.values() for r in several})
        parts.append(f"\n{'; '.join(machines)}.\n")
    return "\n".join(parts)


def _budget(steps: int) -> str:
    if steps == 0:
        return "no training"
    epochs = steps / EPOCH
    return f"{steps} steps" if epochs % 1 else f"{epochs:.0f} epoch{'s' * (epochs > 1)}"


def _cells(recipe: Recipe, seeds: list[Result]) -> list[str]:
    default, settings = Recipe(), []
    if recipe.weights != "none":
        settings.append(f"{recipe.weights} weights")
    if recipe.keep:
        settings.append(f"keep {recipe.keep:.0%}")
    if recipe.images != default.images:
        settings.append(f"{recipe.images} images")
    if recipe.steps:
        settings.append(f"{recipe.opt} {recipe.lr}")
    transfer = recipe.transfer if recipe.start != "relu" else "-"
    if transfer == "soft":
        transfer = f"soft, noise {recipe.noise}, {recipe.order}"
    errors = [result.error for result in seeds]
    spread = f" ± {stdev(errors):.2%} ({len(errors)} seeds)" if len(errors) > 1 else ""
    transferred = mean(result.transferred for result in seeds)
    lesson = recipe.lesson if recipe.steps else "-"
    losses = [loss for result in seeds for loss in result.losses]
    highest = "-"
    if None in losses:
        highest = "diverged"
    elif lesson == "labels":
        highest = f"{max(losses):.2f}"
    return [
        recipe.start, transfer, lesson, ", ".join(settings) or "-",
        f"{_mean(seeds):.2%}{spread}", highest, f"{transferred:.0%}",
        _minutes(result.match_seconds for result in seeds),
        _minutes(result.train_seconds for result in seeds),
    ]  # fmt: skip


def _minutes(seconds: Iterable[float]) -> str:
    minutes = mean(seconds) / 60
    return f"{minutes:.1f} min" if minutes >= 0.05 else "-"


def _listed(seeds: list[Result]) -> str:
    return ", ".join(f"{r.error:.2%}" for r in sorted(seeds, key=lambda r: r.recipe.seed))


def _mean(seeds: list[Result]) -> float:
    return mean(result.error for result in seeds)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
