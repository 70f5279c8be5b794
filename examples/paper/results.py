"""The trainings of one experiment together, in the file from which tables and figures are made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from networks import ROWS

Run = dict[str, Any]
"""What `Job.run` returns: one training."""

_VERSION = 1


@dataclass(frozen=True)
class Results:
    """All trainings of one experiment, made with the same settings.

    Args:
        name: of the experiment, such as ``"mnist"``.
        settings: task, training images and protocol of all runs.
        runs: one per network and seed, in the order of the paper's table.
    """

    name: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @classmethod
    def gather(cls, name: str, runs: Iterable[Run]) -> Results:
        """Put runs together that have ended in any order.

        Raises:
            ValueError: there are none, or their settings differ.
        """
        order = [row.name for row in ROWS]
        given = sorted(runs, key=lambda run: (order.index(run["row"]), run["seed"]))
        if not given:
            raise ValueError(f"{name}: no training has ended yet.")
        settings = given[0]["settings"]
        if any(run["settings"] != settings for run in given):
            raise ValueError(f"{name}: the trainings were made with different settings.")
        bare = ({key: value for key, value in run.items() if key != "settings"} for run in given)
        return cls(name, settings, tuple(bare))

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.settings["task"])

    @property
    def rows(self) -> tuple[str, ...]:
        """The networks that there are, in the order of the paper."""
        return tuple(dict.fromkeys(run["row"] for run in self.runs))

    def of(self, row: str) -> list[Run]:
        """The runs of one network, by seed."""
        return [run for run in self.runs if run["row"] == row]

    def scores(self, row: str, measure: str) -> list[float]:
        """One number per seed; infinite where the training diverged.

        Args:
            row: of the network.
            measure: ``"conv"`` (the last epoch) or ``"best"`` (of all epochs).
        """
        values = (run[measure] for run in self.of(row))
        return [float("inf") if value is None else value for value in values]

    def to_json(self) -> str:
        """One line per run, so that changes can be read in a diff."""
        head = {"version": _VERSION, "name": self.name, "settings": self.settings}
        runs = ",\n".join(json.dumps(run) for run in self.runs)
        return f'{json.dumps(head)[:-1]}, "runs": [\n{runs}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is of a newer version or of something else.
        """
        data = json.loads(text)
        if data.get("version") != _VERSION or "runs" not in data:
            raise ValueError(f"these are no results of version {_VERSION}: {text[:60]!r}")
        return cls(data["name"], data["settings"], tuple(data["runs"]))
