"""Recipes of the study of matched targets, their results, and the page made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["Recipe", "Result", "read_results", "write_table"]

EPOCH = 390  # steps of 128 images

HEAD = """# Sinusoidal networks from trained ones

CIFAR-10 ResNets (He et al. 2016, `../shared/data`) with every activation replaced by a sinusoid,
baked. Written by `python benchmarks/pretrained.py table` from the files in
[pretrained/](pretrained), one per run of `python benchmarks/pretrained.py run ...`.

Starts: *plain*, `sin(x)`; *symmetric*, `a*sin(w*x + c) + b` fitted to what the source makes of the
same inputs; *matched*, fitted to the original network; *refitted*, matched and the layers behind
each site refitted; *relu*, the original network, fine-tuned with the same settings. Lessons:
*labels*; *teacher*, the original network's answers and features and no labels (`distill`); *both*,
labels and answers. Batches of 128 with crops and flips, cosine schedule, gradient norm clipped at
2; weight decay 1e-4 where there are labels. Settings: optimizer and highest learning rate.
Errors are those of the 10,000 test images at the end, whose standard error is about 0.3 points;
with several seeds mean and standard deviation. Highest loss: of the twentieth of the training in
which the cross entropy is worst; it says how deep the valley is through which a transfer goes.
"""


@dataclass(frozen=True)
class Recipe:
    """How a network becomes sinusoidal."""

    depth: int = 20
    start: str = "matched"
    weights: str = "none"
    images: int = 1024
    transfer: str = "hard"
    noise: str = "batch"
    order: str = "joint"
    lesson: str = "labels"
    steps: int = 0
    opt: str = "sgd"
    lr: float = 0.02
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file: what differs from the defaults."""
        default = Recipe()
        parts = [f"resnet{self.depth}", self.start]
        keys = ("weights", "transfer", "noise", "order", "lesson", "opt")
        parts += [getattr(self, k) for k in keys if getattr(self, k) != getattr(default, k)]
        if self.images != default.images:
            parts.append(f"{self.images}images")
        if self.lr != default.lr:
            parts.append(f"lr{self.lr}")
        return "-".join([*parts, f"{self.steps}steps", f"seed{self.seed}"])


@dataclass(frozen=True)
class Result:
    """What became of it: `error` and `transferred` as shares, `losses` as means of parts."""

    recipe: Recipe
    error: float
    transferred: float
    match_seconds: float
    train_seconds: float
    losses: Sequence[float]
    machine: str


def read_results(folder: Path) -> list[Result]:
    """All results of a folder."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [Result(**{**values, "recipe": Recipe(**values["recipe"])}) for values in found]


def write_table(results: Iterable[Result]) -> str:
    """The page: a section per network and number of steps, the seeds of a recipe in one row."""
    sections: dict[tuple[int, int], dict[Recipe, list[Result]]] = {}
    for result in results:
        recipe = result.recipe
        section = sections.setdefault((recipe.depth, recipe.steps), {})
        section.setdefault(Recipe(**{**vars(recipe), "seed": 0}), []).append(result)
    parts = [HEAD]
    for (depth, steps), rows in sorted(sections.items()):
        parts.append(f"## ResNet-{depth}, {_budget(steps)}\n")
        head = [
            "start",
            "transfer",
            "lesson",
            "settings",
            "error",
            "highest loss",
            "transferred",
            "minutes",
        ]
        parts += [_line(head), _line(["---"] * len(head))]
        for recipe, seeds in sorted(rows.items(), key=lambda row: _mean(row[1])):
            parts.append(_line(_cells(recipe, seeds)))
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
    minutes = mean(result.match_seconds + result.train_seconds for result in seeds) / 60
    lesson = recipe.lesson if recipe.steps else "-"
    highest = f"{max(max(r.losses) for r in seeds):.2f}" if lesson == "labels" else "-"
    return [
        recipe.start, transfer, lesson, ", ".join(settings) or "-",
        f"{_mean(seeds):.2%}{spread}", highest, f"{transferred:.0%}", f"{minutes:.1f}",
    ]  # fmt: skip


def _mean(seeds: list[Result]) -> float:
    return mean(result.error for result in seeds)


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
