"""What `match_targets` found, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transfer_surgery.reports import columns

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


@dataclass(frozen=True)
class MatchReport:
    """Rows in the order in which the sites run; prints as a table."""

    rows: tuple[MatchRow, ...]

    def __iter__(self) -> Iterator[MatchRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = ("path", "source", "target", "R2", "periods", "KL")
        lines = [head, *(_cells(row) for row in self.rows)]
        return columns(lines, left=3)

    def plot(self, ax: Axes | None = None) -> Axes:
        """`transfer_surgery.reports.plot_match` of this report."""
        from transfer_surgery.reports import plot_match

        return plot_match(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"version": 1, "rows": [asdict(row) for row in self.rows]}


def _cells(row: MatchRow) -> tuple[str, ...]:
    if row.r2 is None:
        return (row.path, row.source, row.target, "not run", "", "")
    periods = "-" if row.periods is None else f"{row.periods:.2f}"
    divergence = "-" if row.divergence is None else f"{row.divergence:.4f}"
    return (row.path, row.source, row.target, f"{row.r2:.3f}", periods, divergence)
