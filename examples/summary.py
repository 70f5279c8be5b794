"""A table of what an example measured: a row per stage, with its seconds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import get_console
from rich.table import Table

console = get_console()


@dataclass(frozen=True)
class Stage:
    """How things stood after one part of the run; `None` where a figure has no meaning."""

    name: str
    accuracy: float
    seconds: float
    transferred: float | None = None
    change: float | None = None


@dataclass
class Summary:
    """The stages of a run and the seconds that each took."""

    stages: list[Stage] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)

    def add(
        self,
        name: str,
        accuracy: float,
        *,
        transferred: float | None = None,
        change: float | None = None,
    ) -> None:
        """Add a stage that took the time since the one before.

        Args:
            name: of the stage.
            accuracy: on the test images.
            transferred: share of the gates that are exactly 0.
            change: largest change of any output against the stage before.
        """
        now = time.perf_counter()
        self.stages.append(Stage(name, accuracy, now - self.clock, transferred, change))
        self.clock = now

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [asdict(stage) for stage in self.stages]}

    def table(self) -> Table:
        table = Table(title="test images")
        table.add_column("network")
        for heading in ("accuracy", "error", "transferred", "outputs", "seconds"):
            table.add_column(heading, justify="right")
        for s in self.stages:
            table.add_row(
                s.name,
                f"{s.accuracy:.2%}",
                f"{1 - s.accuracy:.2%}",
                "" if s.transferred is None else f"{s.transferred:.1%}",
                ""
                if s.change is None
                else f"differ by {s.change:.1e}"
                if s.change
                else "unchanged",
                f"{s.seconds:.1f}",
            )
        total = sum(stage.seconds for stage in self.stages)
        table.add_row("", "", "", "", "", f"{total:.1f}", style="bold")
        return table


def describe_change(what: str, change: float) -> None:
    """Print whether outputs stayed the same."""
    verdict = "not identical" if change else "bit-identical"
    console.print(f"{what}: outputs {verdict}, largest difference {change:.1e}")
