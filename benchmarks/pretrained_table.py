"""The results of the study of matched targets, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from markdown_page import fill_blocks, markdown_table
from pretrained_recipes import Recipe


@dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Args:
        recipe: what was run.
        error: share of the test images with a wrong class.
        transferred: share of the gates.
        match_seconds: time of matching.
        train_seconds: time of training.
        losses: means of 20 equal parts of the training; None where the loss was not finite.
        machine: device, threads and versions.
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


def fill(page: str, results: Iterable[Result]) -> str:
    """A page whose block of results is made anew."""
    return fill_blocks(page, {"results": write_tables(results)})


def write_tables(results: Iterable[Result]) -> str:
    """A section for each network and number of steps, with the seeds of a recipe in one row."""
    sections: dict[tuple[int, str, float], dict[Recipe, list[Result]]] = {}
    for result in results:
        recipe = result.recipe
        section = sections.setdefault((recipe.depth, recipe.target, recipe.epochs), {})
        section.setdefault(Recipe(**{**vars(recipe), "seed": 0}), []).append(result)
    parts = []
    for (depth, target, epochs), rows in sorted(sections.items()):
        what = "" if target == "sin" else f", {target}"
        parts.append(f"## ResNet-{depth}{what}, {_budget(epochs)}\n")
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
        best_first = sorted(rows.items(), key=lambda row: _mean(row[1]))
        parts.append(markdown_table(head, [_cells(*row) for row in best_first]))
        for recipe, seeds in rows.items():
            if len(seeds) > 1:  # a mean of 10 % and 88 % would say nothing
                parts.append(f"\n`{recipe.name}` and on: {_listed(seeds)}.")
        machines = sorted({r.machine for several in rows.values() for r in several})
        parts.append(f"\n{'; '.join(machines)}.\n")
    return "\n".join(parts)


def _budget(epochs: float) -> str:
    if epochs == 0:
        return "no training"
    number = f"{epochs:.2g}"
    return f"{number} epoch{'s' * (number != '1')}"


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
    if recipe.batch != default.batch:
        settings.append(f"batches of {recipe.batch}")
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
