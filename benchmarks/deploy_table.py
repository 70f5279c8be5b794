"""The recipes and results of the study of deployment, and the tables of docs/deploy.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from markdown_page import fill_blocks, markdown_table
from study import percent

EPOCH = 351  # steps of 128 images


@dataclass(frozen=True)
class Recipe:
    """How a network gets its new activations.

    Args:
        network: a name of `deploy_networks.NETWORKS`.
        start: ``original``, ``plain`` (swapped alone), ``matched`` or ``refitted``.
        lesson: what trains then: ``none``, ``teacher`` (the original, without labels), ``labels``.
        steps: number of training steps.
        lr: highest learning rate.
        images: number of unlabelled images for matching.
        offset: ``none``, or ``fitted`` where targets have one.
        gates: of squeeze-and-excitation: ``sigmoid``, as it is; or how hardsigmoids come there,
            ``plain`` or ``matched``.
        seed: of the images for matching and of the training.
    """

    network: str
    start: str = "refitted"
    lesson: str = "none"
    steps: int = 0
    lr: float = 1e-3
    images: int = 1024
    offset: str = "none"
    gates: str = "sigmoid"
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its files: what differs from the defaults."""
        default = Recipe(self.network)
        parts = [self.network, self.start]
        for key, value in asdict(self).items():
            if key not in ("network", "start", "seed") and value != getattr(default, key):
                parts.append(value if key == "lesson" else f"{key}{value}")
        return "-".join([*parts, f"seed{self.seed}"])


@dataclass(frozen=True)
class Result:
    """The outcome of one recipe.

    Args:
        recipe: what was run.
        error: share of the test images with a wrong class.
        int8_error: the same in int8, by onnxruntime.
        held_out_error: of training images that no network was trained with.
        held_out_int8_error: the same in int8.
        changed: share of the test images whose class is not that of the original network.
        zeros: share of exact zeros behind the activations.
        left: number of sites that keep numbers of a fitted target.
        seconds: time of matching and training; for the original network, of its training.
        machine: threads and versions.
    """

    recipe: Recipe
    error: float
    int8_error: float
    held_out_error: float
    held_out_int8_error: float
    changed: float
    zeros: float
    left: int
    seconds: float
    machine: str


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a batch, in float and int8, for the recipes of one network."""

    network: str
    batch: int
    milliseconds: dict[str, list[float]]
    machine: str


def published(network: str, seeds: int = 3) -> Iterator[tuple[str, Recipe]]:
    """The rows of its table, with the name that each has there."""
    one = Recipe(network, lesson="labels", steps=EPOCH)
    distilled = Recipe(network, lesson="teacher", steps=EPOCH, lr=3e-3)
    yield "original", Recipe(network, "original")
    yield "swapped alone", Recipe(network, "plain")
    yield "matched", Recipe(network, "matched")
    yield "refitted", Recipe(network, "refitted")
    yield "refitted, with offsets", Recipe(network, "refitted", offset="fitted")
    if network == "efficientnet":  # mobilenetv3 has hardsigmoids, the others no sigmoids
        yield "refitted, plain hardsigmoids", Recipe(network, gates="plain")
        yield "refitted, matched hardsigmoids", Recipe(network, gates="matched")
    for seed in range(seeds):
        yield "refitted, distilled", replace(distilled, seed=seed)
    yield "refitted, distilled for three epochs", replace(distilled, steps=3 * EPOCH)
    yield "refitted, one epoch of labels", one
    yield "original, one epoch of labels", replace(one, start="original")


def read_results(folder: Path) -> list[Result | Latency]:
    """All results of a folder, and the times in its folder ``latency``."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    times = [json.loads(file.read_text()) for file in sorted(folder.glob("latency/*.json"))]
    results = [Result(**{**values, "recipe": Recipe(**values["recipe"])}) for values in found]
    return [*results, *(Latency(**values) for values in times)]


def fill(page: str, found: Iterable[Result | Latency]) -> str:
    """A page with new tables: errors and times of each network, and all that was tried."""
    found = list(found)
    results = [one for one in found if isinstance(one, Result)]
    latencies = [one for one in found if isinstance(one, Latency)]
    texts = {"summary": _summary(results, latencies), "settings": _settings(results)}
    for network in sorted({result.recipe.network for result in results}):
        texts[network] = _errors([r for r in results if r.recipe.network == network])
        if times := [one for one in latencies if one.network == network]:
            texts[f"{network}-latency"] = _times(times)
    return fill_blocks(page, texts)


def _summary(results: Sequence[Result], times: Sequence[Latency]) -> str:
    """What each step of the recipe loses, and what int8 gains, of networks that have all rows."""
    labels = ("swapped alone", "matched", "refitted", "refitted, distilled")
    batches = sorted({found.batch for found in times})
    gains = [f"int8: times as fast, batch {batch}" for batch in batches]
    rows = []
    for network in sorted({r.recipe.network for r in results if r.recipe.start == "original"}):
        errors: dict[str, list[float]] = {}
        for label, recipe in published(network):
            errors.setdefault(label, []).extend(r.error for r in results if r.recipe == recipe)
        base = mean(errors.pop("original"))
        cells = [
            f"{100 * (mean(errors[label]) - base):+.1f}" if errors[label] else ""
            for label in labels
        ]
        before, after = Recipe(network, "original").name, Recipe(network).name
        by_batch = {f.batch: f.milliseconds for f in times if f.network == network}
        for batch in batches:
            known = by_batch.get(batch, {})
            there = before in known and after in known
            cells.append(f"{known[before][1] / known[after][1]:.2f}" if there else "")
        rows.append([network, *cells])
    return markdown_table(["network", *labels, *gains], rows)


def _errors(results: Sequence[Result]) -> str:
    by_recipe = {result.recipe: result for result in results}
    rows: dict[str, list[Result]] = {}
    for label, recipe in published(results[0].recipe.network):
        if recipe in by_recipe:
            rows.setdefault(label, []).append(by_recipe[recipe])
    head = ["network", "test error", "int8", "answers changed", "zeros", "not folded", "minutes"]
    lines = [
        [
            label,
            *(percent([getattr(r, key) for r in seeds], 2) for key in ("error", "int8_error")),
            *(percent([getattr(r, key) for r in seeds], 1) for key in ("changed", "zeros")),
            f"{seeds[0].left} sites" if seeds[0].recipe.start in ("matched", "refitted") else "-",
            f"{mean(r.seconds for r in seeds) / 60:.1f}",
        ]
        for label, seeds in rows.items()
    ]
    machines = "; ".join(sorted({r.machine for seeds in rows.values() for r in seeds}))
    return f"{markdown_table(head, lines)}\n\n{machines}."


def _times(times: Sequence[Latency]) -> str:
    """Ratios to the original network in float, one pair of columns for each size of a batch."""
    times = sorted(times, key=lambda found: found.batch)
    head = ["network"]
    cells: dict[str, dict[str, str]] = {}
    for found in times:
        names = {recipe.name: label for label, recipe in published(found.network, seeds=1)}
        base = _original_ms(found)
        columns = [f"float, batch {found.batch}", f"int8, batch {found.batch}"]
        head += columns
        for name, pair in found.milliseconds.items():
            ratios = (f"{ms / base:.2f}" for ms in pair)
            cells.setdefault(names[name], {}).update(zip(columns, ratios, strict=True))
    originals = (f"{_original_ms(found):.2f} ms for a batch of {found.batch}" for found in times)
    rows = [[label, *(row.get(column, "") for column in head[1:])] for label, row in cells.items()]
    about = f"The original network in float takes {' and '.join(originals)}; {times[0].machine}."
    return f"{markdown_table(head, rows)}\n\n{about}"


def _original_ms(found: Latency) -> float:
    """What the original network takes in float."""
    return found.milliseconds[Recipe(found.network, "original").name][0]


def _settings(results: Sequence[Result]) -> str:
    """What was tried, by the images that were held out."""
    head = ["recipe", "held-out error", "int8", "minutes"]
    lines = [
        [
            f"`{result.recipe.name}`",
            f"{result.held_out_error:.2%}",
            f"{result.held_out_int8_error:.2%}",
            f"{result.seconds / 60:.1f}",
        ]
        for result in sorted(results, key=lambda result: result.recipe.name)
    ]
    return markdown_table(head, lines)
