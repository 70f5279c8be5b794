"""The results of the study of matched targets, and the page made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pretrained_recipes import EPOCH, Recipe

SINUSOIDS = """# Sinusoidal networks from trained ones

Every activation of trained CIFAR-10 ResNets (He et al. 2016) is replaced by a sinusoid. The
networks that are tested are baked.
"""
SWAPS = """# Other swaps

The ReLUs of the CIFAR-10 ResNet-20 are replaced by functions other than sinusoids. The program is
the one of [pretrained.md](pretrained.md), with `--target` and `--keep`. *keep* is the share of the
neurons that stay ReLUs; `swap_targets(keep=...)` chooses them, and the other neurons are matched
again around them. A polynomial here has degree 2.
"""
ABOUT = """
This page is written by `python benchmarks/pretrained.py table --page docs/{name}.md` from the files
in `benchmarks/results/{name}/`. Each file is one run of `python benchmarks/pretrained.py run ...`.
A run needs `cifar10.npz` and `weights/` in the data folder named by TRANSFER_SURGERY_DATA.

*Start* says what the network was before any training:

- *plain*: the target as it is.
- *matched*: `a*f(w*x + c) + b`, fitted to what the original network computes.
- *refitted*: matched, and the layers behind each site are refitted.
- *symmetric*: like matched, but fitted to what the source makes of the same inputs. It was measured
  with an earlier version of the library, which then lost this option.
- *relu*: the original network, trained with the same settings.

*Lesson* says what the training used: *labels*; *teacher* is `distill`, which uses the original
network's outputs and features but no labels; *both* uses labels and the original's outputs.
Training uses batches of 128 images with crops and flips, a cosine schedule, and gradients clipped
at norm 2. Weight decay is 1e-4 where there are labels. *Settings* names the optimizer and the
highest learning rate.

Errors are those of the 10,000 test images after the last step. Their standard error is about 0.3
points. Rows of several seeds give mean and standard deviation, and the single values are listed
below the table. Recipes were compared on these same test images, so the best of many rows looks a
little too good. *Highest loss* is the largest of 20 averages over the training: it shows how deep
the valley is that a transfer passes through. *diverged* means that the loss became infinite,
which ended the training. Minutes were often measured on a busy machine. The minutes of matching
are those of the run that filled `--cache`, which may have used another number of threads.
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
        name: of their folder in benchmarks/results, and of the page.
    """
    sections: dict[tuple[int, str, int], dict[Recipe, list[Result]]] = {}
    for result in results:
        recipe = result.recipe
        section = sections.setdefault((recipe.depth, recipe.target, recipe.steps), {})
        section.setdefault(Recipe(**{**vars(recipe), "seed": 0}), []).append(result)
    head = SINUSOIDS if name == "pretrained" else SWAPS
    parts = [head + ABOUT.format(name=name)]
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
