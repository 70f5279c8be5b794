"""One table under all reports: rows of one kind, as text, HTML, JSON or a data frame."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import pandas as pd

Row = TypeVar("Row")


class Column(NamedTuple):
    """A column of a printed table.

    Args:
        field: name of the row's field that it shows.
        heading: what stands above it; the field's name by default.
        text: how a value is written: a format specification, or a function of the value.
    """

    field: str
    heading: str = ""
    text: str | Callable[[Any], str] = ""

    def cell(self, row: Any) -> str:
        """The text of one row's value; a dash for None."""
        value = getattr(row, self.field)
        if callable(self.text):
            return self.text(value)
        return "-" if value is None else format(value, self.text)


@dataclass(frozen=True, repr=False)
class Table(Generic[Row]):
    """What all reports have in common.

    A subclass is a dataclass itself: it says which `columns` are printed, and may have further
    fields, which `to_dict` and `to_json` include. Notebooks show it as an HTML table.

    Args:
        rows: frozen dataclasses of one class.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Cost:
        ...     path: str
        ...     cost: float | None
        >>> class Costs(Table[Cost]):
        ...     columns = (Column("path"), Column("cost", "KL", ".2f"))
        >>> costs = Costs((Cost("stem", 0.5), Cost("layer1.relu", None)))
        >>> print(costs)
        path           KL
        -----------------
        stem         0.50
        layer1.relu     -
        >>> [row.path for row in costs]
        ['stem', 'layer1.relu']
        >>> costs.to_dict()["rows"][0]
        {'path': 'stem', 'cost': 0.5}
    """

    columns: ClassVar[tuple[Column, ...]]
    version: ClassVar[int] = 1
    """Of the layout of `to_dict`."""

    rows: tuple[Row, ...]

    def total_row(self) -> Row | None:
        """The last line of the printed table, which is not among `rows`; None if there is none."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that are printed below the table."""
        return ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows)"

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        # Words stand at the left of their column, numbers at the right.
        left = [
            all(isinstance(getattr(row, column.field), str) for row in self.rows)
            for column in self.columns
        ]
        lines = [
            "  ".join(
                cell.ljust(width) if is_left else cell.rjust(width)
                for cell, width, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in cells
        ]
        rule = "-" * max(map(len, lines))
        lines.insert(1, rule)
        if self.total_row() is not None:
            lines.insert(-1, rule)
        return "\n".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        headings, *rows = self._cells()
        head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
        body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        lines = "".join(f"<tr>{line}</tr>" for line in (head, *body))
        return f"<table>{lines}</table>" + "".join(f"<p>{escape(n)}</p>" for n in self.notes)

    def _cells(self) -> list[list[str]]:
        """The text of the headings, of each row and of the total."""
        total = self.total_row()
        rows = self.rows if total is None else (*self.rows, total)
        headings = [column.heading or column.field for column in self.columns]
        return [headings, *([column.cell(row) for column in self.columns] for row in rows)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, with the version of this layout."""
        return {"version": self.version, **_listed(asdict(self))}

    def to_json(self) -> str:
        """The text of `to_dict`, in which numbers that are not finite are null."""
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False)

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with one line per row.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.to_dict()["rows"])


def _listed(value: Any) -> Any:
    """The same structure with lists for tuples."""
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, (list, tuple)) else value


def finite(value: Any) -> Any:
    """The same structure with None for nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_frame(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A pandas data frame with one line per mapping of column names to values.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install pandas") from error
    return pd.DataFrame(lines)
