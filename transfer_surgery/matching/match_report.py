"""What `match_targets` found, as a table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transfer_surgery._messages import user_stacklevel
from transfer_surgery._table import Column, Table
from transfer_surgery.matching.output_errors import error_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POOR = 0.5  # share of the variance that a fit should explain
_FAR = 0.05  # relative squared error of the outputs from which on there is advice
_FEW = 30  # values that each gate should have
_OUTSIDE = 0.01  # share of new inputs outside of the fitted range, from which on there is advice


class MatchWarning(UserWarning):
    """A target explains little of its site, was fitted to very few values, or no source stays."""


@dataclass(frozen=True)
class MatchRow:
    """One site.

    Args:
        path: where its unit lives in the model.
        source: the activation that the network had.
        target: the activation that was fitted to it.
        r2: share of the original outputs' variance that the target explains, over all gates; it is
            negative where the mean would be better, and None where the first batch did not come to
            the site.
        periods: median over gates of the number of periods that the data spans; None where the
            target is not periodic.
        errors: relative squared error of each output of the model on examples of the first batch,
            with this site and those before it swapped: 0 is perfect, 1 is as good as the mean. None
            where the outputs cannot be compared.
        values: number of inputs that each gate was fitted to; 0 where other batches than the first
            were seen to come to the site, and None where none was.
        divergence: mean KL divergence of the outputs from the original ones, if they are logits.
        where: source file and line of the site; empty where it is not known.
        range: the lowest and the highest input that the targets of its gates were fitted to.
        outside: share of the inputs that will lie outside of the range of their gate, estimated
            from parts of the inputs that are compared with the others.
    """

    path: str
    source: str
    target: str
    r2: float | None
    periods: float | None
    errors: Mapping[str, float] | None
    values: int | None
    divergence: float | None = None
    where: str = ""
    range: tuple[float, float] | None = None
    outside: float | None = None

    @property
    def place(self) -> str:
        """Its path, with file and line where they are known."""
        return f"{self.path} ({self.where})" if self.where else self.path


@dataclass(frozen=True, repr=False)
class MatchReport(Table[MatchRow]):
    """What `match_targets` found: a table whose rows are in the order in which the sites run.

    Args:
        rows: one per site.
        refitted: paths of the layers whose weights were refitted.
        left: layers behind a site that were not refitted, and why.
        needs_swap: whether the outputs are wrong until `swap_targets` is called: layers were
            refitted to the targets while gates are at the source.
        held: bytes that the waiting forward passes of both networks held at most.
        again: number of batches that were run once more for each module, for lack of memory.
    """

    columns = (
        Column("path"),
        Column("where"),
        Column("source"),
        Column("target"),
        Column("r2", "R2", lambda r2: "not run" if r2 is None else f"{r2:.3f}"),
        Column("periods", text=".2f"),
        Column("range", text=lambda r: "-" if r is None else f"{r[0]:.3g} to {r[1]:.3g}"),
        Column("outside", text=".2%"),
        Column("errors", "output error", error_cell),
        Column("divergence", "KL", ".4f"),
    )
    refitted: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    needs_swap: bool = False
    held: int = 0
    again: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.refitted:
            wrong = "; the outputs are wrong until you call swap_targets(model)" * self.needs_swap
            notes.append(f"{_layers(len(self.refitted))} refitted to these targets{wrong}.")
        if self.left:
            named = ", ".join(f"{path} {reason}" for path, reason in self.left.items())
            notes.append(f"{_layers(len(self.left))} not refitted: {named}.")
        if self.again:
            batches = "1 batch was" if self.again == 1 else f"{self.again} batches were"
            notes.append(
                f"{batches} run once more for each module, for lack of memory; the others held "
                f"{self.held / 2**20:,.0f} MiB. Fewer examples, or a larger max_bytes=, take less "
                "time."
            )
        outside = [row.place for row in self.rows if row.outside and row.outside > _OUTSIDE]
        if outside:
            notes.append(
                f"More than {_OUTSIDE:.0%} of new inputs will lie outside of the fitted range at "
                f"{_some(outside)}: give more examples."
            )
        last = next((row.errors for row in reversed(self.rows) if row.errors), {})
        if max(last.values(), default=0.0) > _FAR:
            notes.append(
                "Output error: 0 is perfect, 1 is as good as the mean. What brings it down, most "
                "first: refit=True, distill after the swap, more inputs, one gate per channel, and "
                "to leave out the sites after which it jumps (exclude=)."
            )
        return tuple(notes)

    def plot(self, ax: Axes | None = None) -> Axes:
        """`transfer_surgery.reports.plot_match` of this report."""
        from transfer_surgery.reports import plot_match

        return plot_match(self, ax)


def _layers(count: int) -> str:
    return "1 layer was" if count == 1 else f"{count} layers were"


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:5]) + ", ..." * (len(places) > 5)


def warn_of_poor_fits(report: MatchReport) -> None:
    """Warn of sites that saw no or few values, and of those that the target hardly explains."""
    missed = [row.place for row in report if row.values == 0]
    few = [row.place for row in report if row.values and row.values < _FEW]
    poor = [row.place for row in report if row.r2 is not None and row.r2 < _POOR]
    for places, problem, remedy in (
        (
            missed,
            "other batches than the first come to a site, whose target stays as it is",
            "let the first batch be one that comes to every site, or leave these out (exclude=)",
        ),
        (few, f"a gate saw fewer than {_FEW} values", "give more examples, some hundred"),
        (
            poor,
            f"less than {_POOR:.0%} of the variance is explained",
            "refit=True and distill make up for most of it; else convert with a finer granularity, "
            "or leave these sites out (exclude=)",
        ),
    ):
        if places:
            text = f"{problem} at {_some(places)}: {remedy}."
            warnings.warn(text, MatchWarning, stacklevel=user_stacklevel())
