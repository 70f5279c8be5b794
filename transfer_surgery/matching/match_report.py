"""What `match_targets` found, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transfer_surgery.reports import Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class MatchWarning(UserWarning):
    """A target explains little of what its site computed, or was fitted to very few values."""


@dataclass(frozen=True)
class MatchRow:
    """One site.

    Args:
        path: where its unit lives in the model.
        source: what was to be matched.
        target: the activation that was fitted.
        r2: share of the variance of the values to be fitted that the target explains, all groups
            together; negative where their mean would be better; None: the site did not run.
        periods: median over gates of the periods that the data spans; None where the target has
            none.
        divergence: mean KL divergence of the model's outputs, read as logits, from the original
            ones on the first batch, with this site and those before swapped.
        values: inputs that each gate was fitted to.
    """

    path: str
    source: str
    target: str
    r2: float | None
    periods: float | None
    divergence: float | None
    values: int | None


@dataclass(frozen=True, repr=False)
class MatchReport(Table[MatchRow]):
    """What `match_targets` found: a table whose rows are in the order in which the sites run."""

    columns = (
        Column("path"),
        Column("source"),
        Column("target"),
        Column("r2", "R2", lambda r2: "not run" if r2 is None else f"{r2:.3f}"),
        Column("periods", text=".2f"),
        Column("divergence", "KL", ".4f"),
    )

    def plot(self, ax: Axes | None = None) -> Axes:
        """`transfer_surgery.reports.plot_match` of this report."""
        from transfer_surgery.reports import plot_match

        return plot_match(self, ax)
