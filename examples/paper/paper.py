"""The experiments of the paper, a command per figure and table.

    python examples/paper/paper.py --help

What is finished is kept in the output folder and not done again; what was interrupted goes on from
its checkpoint. MNIST and CIFAR-10 are read from the folder that TRANSFER_SURGERY_DATA names, where
it is set, else torchvision downloads them to .data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import document as pages
import typer
from experiments import (
    EXPERIMENTS,
    PRECISION,
    QUICK,
    QUICK_PRECISION,
    Experiment,
    run_experiment,
)
from figure1 import Figure1Settings, run_figure1
from machine import Machine
from networks import find_row
from results import Run
from studies import STUDIES, run_study, study_json, vary_settings
from tables import figure1_table

app = typer.Typer(
    help=__doc__.replace("\n\n    ", "\n\n"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # E[z] is no markup
)
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
Value = TypeVar("Value")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another setting; repeat it for several."),
]
Row = Annotated[
    list[str] | None,
    typer.Option("--row", help="Network, such as relu-to-sin; repeat it. Default: all ten."),
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Trainings of each network.")]
Quick = Annotated[bool, typer.Option(help="Minutes on two cores: it shows that all runs, no more.")]
Name = Annotated[
    str | None, typer.Option(help="Of the results; needed where settings are not the default.")
]
Out = Annotated[Path, typer.Option(help="Folder for results, checkpoints and pictures.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Trainings side by side. Default: one per core, 4 a GPU.")
]
Minutes = Annotated[
    float | None, typer.Option(help="Stop after so long; the same command goes on.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, tf32 or bf16. Default: tf32 on cuda, else fp32.")
]
Compile = Annotated[bool | None, typer.Option(help="torch.compile. Default: on cuda.")]
_OUT = Path("runs/paper")


@app.command()
def figure1(assignments: Set = None, study: bool = False, out: Out = _OUT) -> None:
    """One neuron fits sin(2x): resin, sin and resin->sin from w = 6, 50 seeds.

    python examples/paper/paper.py figure1 --set gate_lr=1 --set seeds=10
    """
    settings = _or_complain(lambda: Figure1Settings().changed(assignments or []))
    if study:
        _write(out / "figure1-study.json", json.dumps(vary_settings(settings), indent=0))
        return
    result = run_figure1(settings)
    print(figure1_table(result))
    _write(out / "figure1.json", json.dumps(result))
    _draw(out / "figure1.json", out)


@app.command()
def figure2(
    rows: Row = None,
    seeds: Seeds = None,
    quick: Quick = False,
    assignments: Set = None,
    name: Name = None,
    out: Out = _OUT,
    workers: Workers = None,
    minutes: Minutes = None,
) -> None:
    """Bessel function with noise, 400x400x400: fits, errors without noise, E[z] per layer.

    python examples/paper/paper.py figure2 --row sin --row resin-to-sin --seeds 1
    """
    table1("bessel", rows, seeds, quick, assignments, name, out, workers, minutes, device="cpu")


@app.command()
def table1(
    task: Annotated[str, typer.Argument(help="mnist, resnet20, resnet20-5 or resnet110.")],
    rows: Row = None,
    seeds: Seeds = None,
    quick: Quick = False,
    assignments: Set = None,
    name: Name = None,
    out: Out = _OUT,
    workers: Workers = None,
    minutes: Minutes = None,
    device: Device = "auto",
    precision: Precision = None,
    compile: Compile = None,
) -> None:
    """Image classification: Table 1 and Figure 3.

    python examples/paper/paper.py table1 mnist --row relu-to-sin --set gamma=3 --name gamma3
    """
    machine = _or_complain(lambda: Machine.choose(device, precision, compile))
    experiment = _chosen(task, quick, rows, seeds, assignments)
    _run(name or _name(task, quick), experiment, machine, out, workers, minutes)


@app.command("precision")
def compare_precisions(
    quick: Quick = False, out: Out = _OUT, workers: Workers = None, minutes: Minutes = None
) -> None:
    """relu and relu->sin in float32 and in bfloat16 on a CPU: three epochs, do they agree?"""
    for precision in ("fp32", "bf16"):
        name = _name(f"precision-{precision}", quick)
        experiment = QUICK_PRECISION if quick else PRECISION
        _run(name, experiment, Machine(precision=precision), out, workers, minutes)


@app.command("study")
def study_command(
    task: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}.")],
    out: Out = _OUT,
    workers: Workers = None,
) -> None:
    """What the paper leaves open, one thing at a time."""
    study = _or_complain(lambda: _known(STUDIES, task, "study"))
    name, machine = f"{task}-study", Machine()
    number = workers or machine.side_by_side
    found = _or_complain(lambda: run_study(name, study, machine, out, workers=number, told=_tell))
    _write(out / f"{name}.json", study_json(found))


@app.command()
def document(
    results: Annotated[Path, typer.Option(help="Folder of the JSON results.")] = HERE / "results",
    page: Annotated[Path, typer.Option(help="Page to make the tables of.")] = DOCS / "paper.md",
    pictures: Annotated[Path, typer.Option(help="Folder of the pictures.")] = DOCS / "paper",
) -> None:
    """Make the tables of docs/paper.md and its pictures anew."""
    text = _or_complain(lambda: pages.fill(page.read_text(), results))
    page.write_text(text)
    typer.echo(f"wrote {page}")
    for name in pages.pictures_of(text):
        _draw(results / f"{name}.json", pictures)


def _chosen(
    task: str,
    quick: bool,
    rows: list[str] | None,
    seeds: int | None,
    assignments: list[str] | None,
) -> Experiment:
    """The experiment of a task, as the options change it."""

    def chosen() -> Experiment:
        experiment = _known(QUICK if quick else EXPERIMENTS, task, "task")
        return replace(
            experiment,
            protocol=experiment.protocol.changed(assignments or []),
            seeds=seeds or experiment.seeds,
            rows=tuple(find_row(row).name for row in rows) if rows else experiment.rows,
        )

    return _or_complain(chosen)


def _run(
    name: str,
    experiment: Experiment,
    machine: Machine,
    out: Path,
    workers: int | None,
    minutes: float | None,
) -> None:
    """Train, and write and print what has ended."""
    number = workers or machine.side_by_side
    typer.echo(
        f"{name}: {len(experiment.rows)} networks, {experiment.seeds} seeds, {number} side by side "
        f"on {machine.name}; results in {out / name}"
    )
    results = _or_complain(
        lambda: run_experiment(
            name, experiment, machine, out, workers=number, minutes=minutes, told=_tell
        )
    )
    _write(out / f"{name}.json", results.to_json())
    for text in pages.tables(results):
        print(f"\n{text}")
    _draw(out / f"{name}.json", out)
    missing = [job for job in experiment.jobs(machine, out / name) if not job.file.exists()]
    if missing:
        typer.echo(f"{len(missing)} trainings are left: the same command goes on with them.")


def _name(task: str, quick: bool) -> str:
    return f"{task}-quick" if quick else task


def _known(table: dict[str, Value], key: str, kind: str) -> Value:
    if key not in table:
        raise ValueError(f"unknown {kind} {key!r}. Known: {', '.join(table)}.")
    return table[key]


def _tell(run: Run) -> None:
    gate = run["curve"].get("mean_gate")
    ended = f"error {run['conv']:.4g}" if run["diverged"] is None else "diverged"
    typer.echo(
        f"{run['row']} (seed {run['seed']}): {ended}"
        + (f", E[z] {gate[-1]:.3f}" if gate else "")
        + f", {run['seconds']:.0f} s"
    )


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    typer.echo(f"wrote {file}")


def _draw(results: Path, pictures: Path) -> None:
    picture = pictures / f"{results.stem}.png"
    pages.draw(results, picture)
    typer.echo(f"wrote {picture}")


def _or_complain(call: Callable[[], Value]) -> Value:
    """The value, or a message and exit status 2 where what the user asked for cannot be done."""
    try:
        return call()
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
