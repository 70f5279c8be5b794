"""docs/paper.md and its pictures, made from the results that lie beside them.

A page says where a table goes: it stands between ``<!-- begin mnist.errors -->`` and
``<!-- end mnist.errors -->``, where ``mnist`` is the name of a file of results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transfer_surgery.reproduce.draw_figure1 import draw_figure1
from transfer_surgery.reproduce.draw_figure2 import draw_figure2
from transfer_surgery.reproduce.draw_figure3 import draw_figure3
from transfer_surgery.reproduce.figure1 import NETWORKS
from transfer_surgery.reproduce.figure1_sensitivity import sensitivity_table
from transfer_surgery.reproduce.results import Results
from transfer_surgery.reproduce.studies import study_table
from transfer_surgery.reproduce.tables import (
    claims_table,
    error_table,
    figure1_table,
    gate_table,
    machine_line,
)

__all__ = ["draw", "fill", "tables"]

_BLOCK = re.compile(r"(<!-- begin ([\w-]+)\.(\w+) -->\n).*?(<!-- end \2\.\3 -->)", re.DOTALL)

_OF_RESULTS: dict[str, Callable[[Results], str]] = {
    "machine": machine_line,
    "errors": error_table,
    "claims": claims_table,
    "gates": gate_table,
}
_OF_JSON: dict[str, Callable[[Any], str]] = {
    "found": figure1_table,
    "sensitivity": sensitivity_table,
    "study": study_table,
}


def fill(page: str, folder: Path) -> str:
    """A page with all its tables made anew.

    Args:
        page: Markdown.
        folder: of the results.

    Raises:
        ValueError: a table of an unknown kind, or of results that are not there.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, kind, end = match.groups()
        return f"{begin}{_table(folder / f'{name}.json', kind)}\n{end}"

    return _BLOCK.sub(table, page)


def _table(file: Path, kind: str) -> str:
    if not file.exists():
        raise ValueError(f"a table of the page needs {file}, which is not there.")
    text = file.read_text()
    if kind in _OF_RESULTS:
        return _OF_RESULTS[kind](Results.from_json(text))
    if kind in _OF_JSON:
        return _OF_JSON[kind](json.loads(text))
    raise ValueError(f"unknown table {kind!r}; known: {', '.join([*_OF_RESULTS, *_OF_JSON])}.")


def tables(results: Results) -> Iterator[str]:
    """All tables that there are of results."""
    yield from filter(None, (table(results) for table in _OF_RESULTS.values()))


def draw(folder: Path, name: str = "*") -> Iterator[Path]:
    """Draw the picture of each file of results, beside it.

    Args:
        folder: of the results.
        name: of one of them; by default all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    for file in sorted(folder.glob(f"{name}.json")):
        data = json.loads(file.read_text())
        if "networks" in data:
            figure = draw_figure1(data)
        elif "runs" not in data:
            continue  # a study: tables only
        elif (results := Results.from_json(file.read_text())).task == "bessel":
            shown = [run for run in results.runs if run["row"] in NETWORKS]  # as in the paper
            figure = draw_figure2(shown or results.runs)
        else:
            figure = draw_figure3([results])
        picture = file.with_suffix(".png")
        figure.savefig(picture, dpi=100)
        yield picture
