"""Check every model of timm, torchvision and transformers: unchanged, trainable, bakeable.

    python benchmarks/zoo_coverage.py --out results.jsonl --table docs/coverage.md

Interrupt it at will: started again, it goes on where it was. benchmarks/README.md says what is
checked and what the fields of a result mean.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from zoo.models import model_names, select
from zoo.records import complete, pending, problem, read, write
from zoo.runner import Bounds, run
from zoo.table import render

FAMILIES = Path(__file__).with_name("families.txt")
console = Console()
app = typer.Typer(add_completion=False)


class Redo(StrEnum):
    """Which models to check again although the file has them."""

    none = "none"
    failed = "failed"
    all = "all"


@app.command()
def main(
    out: Annotated[
        Path, typer.Option(help="File of JSON lines; the run goes on from what it holds.")
    ],
    models: Annotated[
        list[str] | None, typer.Option(help="Globs on names such as 'timm:resnet*'.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Check this many, at random.")] = None,
    seed: Annotated[
        int, typer.Option(help="Seed for the order of the models and for --sample.")
    ] = 0,
    families: Annotated[
        bool, typer.Option("--families", help="Check only the smallest model of each family.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of models at a time, with one thread each.")
    ] = 2,
    timeout: Annotated[float, typer.Option(help="Time limit in seconds for each model.")] = 300.0,
    memory_gib: Annotated[
        float, typer.Option(help="Memory limit in GiB for all processes together.")
    ] = 18.0,
    redo: Annotated[Redo, typer.Option(help="Which models to check again.")] = Redo.none,
    oracle: Annotated[
        Path | None, typer.Option(help="JSON with independent counts, to compare in the table.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Write the Markdown table here.")] = None,
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Check nothing; show what the file has.")
    ] = False,
) -> None:
    """Check models of the zoos; the exit status is 1 if one has a problem."""
    names = FAMILIES.read_text().split() if families else model_names()
    chosen = select(names, models or (), sample, seed)
    if not chosen:
        raise typer.BadParameter(f"no model matches {models}.")
    todo = pending(chosen, read(out), redo.value)
    console.print(f"{len(chosen)} models, {len(chosen) - len(todo)} of them in {out.name} already")
    if only_table:
        chosen = [name for name in chosen if name in read(out)]
    else:
        _run(todo, out, Bounds(jobs, timeout, memory_gib))
    records = read(out)
    if table:
        counts = json.loads(oracle.read_text()) if oracle else {}
        page = render(records.values(), counts, _command(), listed=_listed(records))
        table.write_text(page)
    failed = [name for name in chosen if not records[name]["ok"]]
    console.print(f"{len(chosen) - len(failed)} of {len(chosen)} models without a problem")
    raise typer.Exit(bool(failed))


def _run(todo: list[str], out: Path, bounds: Bounds) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task, start = progress.add_task("models", total=len(todo)), time.monotonic()
        for record in map(complete, run(todo, bounds)):
            write(out, record)
            progress.advance(task)
            if trouble := problem(record):
                progress.console.print(f"{record['name']}: {trouble}", markup=False)
    if todo:
        seconds = time.monotonic() - start
        console.print(f"{seconds:.0f} s, {seconds / len(todo):.1f} s per model")


def _listed(names: Iterable[str]) -> int:
    """How many models there are in the zoos of these."""
    return len(model_names({name.partition(":")[0] for name in names}))


def _command() -> str:
    """What was typed, without the folders of this machine."""
    words = [Path(w).name if w.startswith("/") else w for w in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/zoo_coverage.py", *words])


if __name__ == "__main__":
    app()
