"""The results of the everyday swaps, and the tables of docs/everyday.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from markdown_page import block_names, fill_blocks, markdown_table
from study import percent

PAGE = Path(__file__).parents[1] / "docs" / "everyday.md"
RESULTS = Path(__file__).with_name("results") / "everyday"
STARTS = ("original", "plain", "matched", "refitted")
_HEAD = (
    *("network", "test error", "answers changed", "zeros"),
    *("fine-tuned: test error", "zeros", "not folded", "seconds"),
)


@dataclass(frozen=True)
class Row:
    """The outcome of one way to swap.

    Args:
        start: one of `STARTS`.
        error: share of the test images with a wrong class, before any training.
        changed: share of the test images whose class is not that of the original network, then.
        zeros: share of exact zeros behind the activations, then.
        tuned_error: the same share as `error`, after fine-tuning.
        tuned_zeros: the same share as `zeros`, after fine-tuning.
        left: number of sites whose fitted numbers could not all be folded.
        seconds: time of the swap, mostly of matching.
    """

    start: str
    error: float
    changed: float
    zeros: float
    tuned_error: float
    tuned_zeros: float
    left: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """One swap with one seed: `steps` of training, then `tune_steps` of fine-tuning."""

    swap: str
    seed: int
    steps: int
    tune_steps: int
    images: int
    rows: Sequence[Row]
    machine: str


def read_results(folder: Path) -> list[Result]:
    """All results of a folder."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return [Result(**{**values, "rows": [Row(**r) for r in values["rows"]]}) for values in found]


def fill(page: str, results: Iterable[Result]) -> str:
    """A page whose tables, each in the block of its swap, are made anew.

    Raises:
        ValueError: a swap of the page has no result.
    """
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(result.swap, []).append(result)
    names = block_names(page)
    if missing := [swap for swap in names if swap not in runs]:
        raise ValueError(f"there is no result of {', '.join(missing)}.")
    return fill_blocks(page, {swap: _table(runs[swap]) for swap in names})


def _table(runs: Sequence[Result]) -> str:
    cells_of = []
    for start in STARTS:
        rows = [row for run in runs for row in run.rows if row.start == start]
        columns = (
            ("error", 2),
            ("changed", 2),
            ("zeros", 1),
            ("tuned_error", 2),
            ("tuned_zeros", 1),
        )
        cells = [percent([getattr(row, name) for row in rows], n) for name, n in columns]
        left = "-" if start in ("original", "plain") else f"{mean(r.left for r in rows):.0f} sites"
        cells_of.append([start, *cells, left, f"{mean(row.seconds for row in rows):.0f}"])
    one = runs[0]
    seeds = f"Mean ± standard deviation of {len(runs)} seeds" if len(runs) > 1 else "One seed"
    about = f"{one.steps} steps of training, {one.tune_steps} of fine-tuning, {one.images} images"
    machines = "; ".join(sorted({run.machine for run in runs}))
    note = f"{seeds}; {about} for matching; {machines}."
    return f"{markdown_table(_HEAD, cells_of)}\n\n{note}"
