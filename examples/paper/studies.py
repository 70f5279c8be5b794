"""What the paper leaves open, changed one thing at a time: does the outcome depend on it?"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS, Experiment, run_experiment
from figure1 import NETWORKS, Figure1Settings, train
from machine import Machine
from results import Run

from transfer_surgery import FrozenGatesWarning


@dataclass(frozen=True)
class Study:
    """Trainings with other settings.

    Args:
        base: what is changed.
        changes: for each line, what is changed, as ``--set`` takes it, and of which networks.
    """

    base: Experiment
    changes: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    def experiments(self) -> dict[str, Experiment]:
        """An experiment per line, by the words that name the change."""
        return {
            " ".join(change) or "as settled": replace(
                self.base, protocol=self.base.protocol.changed(change), rows=rows
            )
            for change, rows in self.changes
        }


def run_study(
    name: str,
    study: Study,
    machine: Machine,
    folder: Path,
    *,
    workers: int,
    told: Callable[[Run], None] = lambda _: None,
) -> dict[str, Any]:
    """Train all of a study's networks.

    Args:
        name: of the study and of its folder.
        study: what is trained.
        machine: where.
        folder: where results and checkpoints of all experiments are.
        workers: trainings side by side.
        told: called with each training that has ended.

    Returns:
        Plain JSON: the settings that are changed, and a list of ``"changed"`` with, for each
        network, the error in the last epoch and the mean gate of each seed.
    """
    lines = []
    for words, experiment in study.experiments().items():
        place = folder / name
        results = run_experiment(
            words.replace(" ", ","), experiment, machine, place, workers=workers, told=told
        )
        networks = {
            row: {
                "conv": [run["conv"] for run in results.of(row)],
                "mean_gate": [run["curve"].get("mean_gate", [None])[-1] for run in results.of(row)],
            }
            for row in results.rows
        }
        lines.append({"changed": words, "networks": networks})
    return {
        "task": study.base.task,
        "settings": study.base.protocol.to_dict(),
        "machine": machine.name,
        "lines": lines,
    }


def study_json(study: Mapping[str, Any]) -> str:
    """One line per change."""
    head = {key: value for key, value in study.items() if key != "lines"}
    lines = ",\n".join(json.dumps(line) for line in study["lines"])
    return f'{json.dumps(head)[:-1]}, "lines": [\n{lines}\n]}}\n'


_SOFT = ("relu->sin",)
_BOTH = ("relu", "relu->sin")
_FITS = ("resin", "sin", "resin->sin")

STUDIES = {
    "bessel": Study(
        replace(EXPERIMENTS["bessel"], seeds=2),
        (
            ((), _FITS),
            (("sin_init=kaiming",), ("sin",)),
            (("sin_std=0.316",), ("sin",)),
            (("gamma=20",), _FITS[2:]),
            (("gamma=2000",), _FITS[2:]),
            (("init=alpha", "gamma=0.7"), _FITS[2:]),
            (("noise=example",), _FITS[2:]),
            (("noise=none",), _FITS[2:]),
            (("granularity=layer",), _FITS[2:]),
            (("epochs=200",), _FITS),
            (("epochs=800",), _FITS[1:]),
            (("epochs=350", "restart=50", "restart_factor=2"), _FITS),
            (("lr=0.01",), _FITS),
            (("clip=0",), _FITS),
        ),
    ),
    "mnist": Study(
        # One cycle less.
        replace(
            EXPERIMENTS["mnist"],
            protocol=EXPERIMENTS["mnist"].protocol.changed(["epochs=7"]),
            seeds=1,
        ),
        (
            ((), ("sin", *_BOTH)),
            (("clip=0",), ("sin", *_BOTH)),
            (("kaiming=normal",), _BOTH),
            (("restart=0",), _BOTH),
            (("sin_std=0.316",), ("sin",)),
            (("sin_init=kaiming",), ("sin",)),
            (("gamma=1",), _SOFT),
            (("gamma=100",), _SOFT),
            (("init=alpha", "gamma=0.03"), _SOFT),
            (("noise=example",), _SOFT),
            (("noise=none",), _SOFT),
            (("granularity=layer",), _SOFT),
            (("granularity=neuron",), _SOFT),
            (("reduction=neurons",), _SOFT),
            (("gate_weight_decay=0.0",), _SOFT),
        ),
    ),
}

_GATES: tuple[dict[str, Any], ...] = (
    *({"gate_lr": speed, "gamma": gamma} for speed, gamma in product((0.1, 0.25, 1), (0.1, 1, 10))),
    {"gate_lr": 0.025, "steps": 8000},
    {"lr": 0.02, "gate_lr": 0.1, "steps": 8000},
    {"noise": "none"},
    {"noise": "batch"},
    {"noise": "batch", "lr": 0.02, "gate_lr": 0.5},
    {"init": "alpha"},
    {"init": "alpha", "noise": "none"},
)
"""Changes that concern *resin->sin* alone, or are looked at in it alone."""

_TRAININGS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.02, "gate_lr": 0.25},
    {"points": 65},
    {"points": 513},
    {"batch": 32},
    {"weight_decay": 1e-4},
    {"weight_decay": 0.02},
    {"optimizer": "sgd", "gate_lr": 1, "gamma": 10},
)


def vary_settings(settings: Figure1Settings) -> list[dict[str, Any]]:
    """Train again with other settings, one to three of them at a time: minutes on one core.

    Returns:
        Plain JSON, a row each: what was ``"changed"``, and ``"networks"`` with, for each network
        looked at, the share of the seeds that ``"found"`` w = 2 as a sine, the share of those whose
        gate was ``"transferred"``, and the median of ``"w"``.
    """
    rows = [(changed, NETWORKS[-1:]) for changed in _GATES]
    rows += [(changed, NETWORKS) for changed in _TRAININGS]
    found = []
    for changed, networks in rows:
        other = replace(settings, **changed)
        seen = {network: _summary(network, other) for network in networks}
        found.append({"changed": changed, "networks": seen})
    return found


def _summary(network: str, settings: Figure1Settings) -> dict[str, float]:
    with warnings.catch_warnings():  # the share of the transferred gates tells
        warnings.simplefilter("ignore", FrozenGatesWarning)
        outcome = train(network, settings)
    return {
        "found": outcome.found.double().mean().item(),
        "transferred": (outcome.z == 0).double().mean().item(),
        "w": round(outcome.w.median().item(), 4),
    }
