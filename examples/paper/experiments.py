"""The settings that we settled on for each task, whole and quick; docs/paper.md says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import Job, run_jobs
from machine import Machine
from networks import ROWS
from protocol import Protocol
from results import Results, Run


@dataclass(frozen=True)
class Experiment:
    """What is trained, and how.

    Args:
        task: one of `tasks.TASKS`.
        protocol: of each training.
        seeds: trainings of each network.
        rows: the networks; by default all ten.
        limit: images to use, of the training and of the test images; None: all.
    """

    task: str
    protocol: Protocol
    seeds: int
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    limit: int | None = None

    def jobs(self, machine: Machine, folder: Path) -> list[Job]:
        """Its trainings, the first seed of all networks first."""
        return [
            Job(self.task, row, seed, self.protocol, machine, folder, self.limit)
            for seed in range(self.seeds)
            for row in self.rows
        ]


def run_experiment(
    name: str,
    experiment: Experiment,
    machine: Machine,
    folder: Path,
    *,
    workers: int,
    minutes: float | None = None,
    told: Callable[[Run], None] = lambda _: None,
) -> Results:
    """Train what is not trained yet, and put together all trainings that there are of this name.

    Args:
        name: of the results and of their folder.
        experiment: what is trained.
        machine: where.
        folder: where results and checkpoints of all experiments are.
        workers: trainings side by side.
        minutes: stop after so long, with checkpoints; the same call goes on. None: to the end.
        told: called with each training that has ended.

    Raises:
        ValueError: results of other settings are there under this name, or none has ended.
    """
    place = folder / name
    for run in run_jobs(experiment.jobs(machine, place), workers, minutes=minutes):
        told(run)
    # Rows and seeds that earlier calls have trained belong to the same table.
    return Results.gather(name, (json.loads(file.read_text()) for file in place.glob("*.json")))


_BESSEL = Protocol(epochs=400, clip=1.0, gamma=200.0)
_MNIST = Protocol(epochs=15, restart=1, restart_factor=2, clip=1.0, gamma=10.0)
_CIFAR = Protocol(epochs=200, restart=100, gamma=1.0)
# As above, on a CPU: one cycle, and gamma so that E[z] falls at the same share of the training.
_SHORT_CIFAR = replace(_CIFAR, epochs=5, restart=0, gamma=40.0)
_DEEPEST = ("relu", "relu->sin")  # the others fail to train, says the paper

EXPERIMENTS = {
    "bessel": Experiment("bessel", _BESSEL, seeds=5),
    "mnist": Experiment("mnist", _MNIST, seeds=5),
    "resnet20": Experiment("resnet20", _CIFAR, seeds=3),
    "resnet20-5": Experiment("resnet20", _SHORT_CIFAR, seeds=1),
    "resnet110": Experiment("resnet110", _CIFAR, seeds=1, rows=_DEEPEST),
}

_QUICK_MNIST = replace(_MNIST, epochs=3, gamma=50.0)
_QUICK_CIFAR = replace(_CIFAR, epochs=4, restart=0, clip=1.0, gamma=300.0)

QUICK = {
    "bessel": Experiment("bessel", _BESSEL, seeds=1),
    "mnist": Experiment("mnist", _QUICK_MNIST, seeds=1),
    "resnet20": Experiment("resnet20", _QUICK_CIFAR, seeds=1, limit=3200),
    "resnet110": Experiment("resnet110", _QUICK_CIFAR, seeds=1, rows=_DEEPEST, limit=640),
}
"""The same within minutes on two cores: whether all runs, not what the paper claims."""

_THREE_EPOCHS = replace(_CIFAR, epochs=3, restart=0, gamma=67.0)
PRECISION = Experiment("resnet20", _THREE_EPOCHS, seeds=2, rows=_DEEPEST)
QUICK_PRECISION = replace(QUICK["resnet20"], seeds=2, rows=_DEEPEST)
"""What is trained in float32 and in bfloat16, to see whether that makes a difference."""
