"""``transfer-surgery reproduce``: a command per figure and table of the paper."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from transfer_surgery.reproduce import documents
from transfer_surgery.reproduce.experiments import EXPERIMENTS, QUICK, Experiment, run_experiment
from transfer_surgery.reproduce.figure1 import Fit, run_figure1
from transfer_surgery.reproduce.figure1_sensitivity import sensitivity
from transfer_surgery.reproduce.machine import Machine
from transfer_surgery.reproduce.results import Run
from transfer_surgery.reproduce.rows import find_row
from transfer_surgery.reproduce.studies import STUDIES, run_study, study_json
from transfer_surgery.reproduce.tables import figure1_table

__all__ = ["reproduce"]

reproduce = typer.Typer(
    help="Run the experiments of the paper again.\n\n"
    "What is finished is kept in the output folder and not done again; what was interrupted goes "
    "on from its checkpoint. MNIST and CIFAR-10 are read from the folder that "
    "TRANSFER_SURGERY_DATA names, where it is set, else downloaded by torchvision to .data.",
    no_args_is_help=True,
)

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
Quick = Annotated[bool, typer.Option(help="Whether all runs, in minutes on two cores.")]
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
Precision = Annotated[str | None, typer.Option(help="fp32, tf32 or bf16. Default: tf32 on cuda.")]
Compile = Annotated[bool | None, typer.Option(help="torch.compile. Default: on cuda.")]
_OUT = Path("runs/paper")


@reproduce.command()
def figure1(assignments: Set = None, study: bool = False, out: Out = _OUT) -> None:
    """One neuron fits sin(2x): resin, sin and resin->sin from w = 6, 50 seeds.

    transfer-surgery reproduce figure1 --set gate_lr=1 --set seeds=10
    """
    settings = _or_complain(lambda: Fit().changed(assignments or []))
    if study:
        _write(out / "figure1-study.json", json.dumps(sensitivity(settings), indent=0))
        return
    result = run_figure1(settings)
    print(figure1_table(result))
    _write(out / "figure1.json", json.dumps(result))
    _draw(out, "figure1")


@reproduce.command()
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

    transfer-surgery reproduce figure2 --row sin --row resin-to-sin --seeds 1
    """
    machine = Machine()
    experiment = _chosen("bessel", quick, rows, seeds, assignments)
    _run(name or _name("bessel", quick), experiment, machine, out, workers, minutes)


@reproduce.command()
def table1(
    task: Annotated[str, typer.Argument(help="mnist, resnet20 or resnet110.")],
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

    transfer-surgery reproduce table1 mnist --row relu --row relu-to-sin --set gamma=3 --name gamma3
    """
    machine = _or_complain(lambda: _machine(device, precision, compile))
    experiment = _chosen(task, quick, rows, seeds, assignments)
    _run(name or _name(task, quick), experiment, machine, out, workers, minutes)


@reproduce.command("study")
def study_command(
    task: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}.")],
    out: Out = _OUT,
    workers: Workers = None,
) -> None:
    """What the paper leaves open, one thing at a time."""
    study = _or_complain(lambda: _known(STUDIES, task, "study"))
    name = f"{task}-study"
    machine = Machine()
    found = _or_complain(
        lambda: run_study(
            name, study, machine, out, workers=workers or _workers(machine), told=_tell
        )
    )
    _write(out / f"{name}.json", study_json(found))


@reproduce.command()
def document(
    results: Annotated[Path, typer.Option(help="Folder of the JSON results.")] = Path("docs/paper"),
    page: Annotated[Path, typer.Option(help="Page whose tables are made.")] = Path("docs/paper.md"),
) -> None:
    """Make the tables of docs/paper.md and the pictures beside the results anew."""
    text = _or_complain(lambda: documents.fill(page.read_text(), results))
    page.write_text(text)
    typer.echo(f"wrote {page}")
    _draw(results)


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
    number = workers or _workers(machine)
    typer.echo(
        f"{name}: {len(experiment.rows)} networks, {experiment.seeds} seeds, {number} side by side "
        f"on {machine.name}; results in {out / name}"
    )
    results = _or_complain(
        lambda: run_experiment(
            name, experiment, machine, out, workers=number, minutes=minutes, told=_tell
        )
    )
    missing = experiment.seeds * len(experiment.rows) - len(results.runs)
    _write(out / f"{name}.json", results.to_json())
    for text in documents.tables(results):
        print(f"\n{text}")
    _draw(out, name)
    if missing:
        typer.echo(f"{missing} trainings are left: the same command goes on with them.")


def _machine(device: str, precision: str | None, compile: bool | None) -> Machine:
    fastest = Machine.fastest()
    machine = fastest if device in ("auto", fastest.device) else Machine(device)
    return replace(
        machine,
        precision=machine.precision if precision is None else precision,
        compile=machine.compile if compile is None else compile,
    )


def _workers(machine: Machine) -> int:
    """One training does not fill a GPU; on a CPU each has threads of its own."""
    if machine.device.startswith("cuda"):
        return 4
    return max((os.cpu_count() or 1) // machine.threads, 1)


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


def _draw(folder: Path, name: str = "*") -> None:
    for picture in documents.draw(folder, name):
        typer.echo(f"wrote {picture}")


def _or_complain(call: Callable[[], Value]) -> Value:
    """The value, or a message and exit status 2 where what the user asked for cannot be done."""
    try:
        return call()
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
