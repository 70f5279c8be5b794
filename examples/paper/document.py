"""docs/paper.md and its pictures, made from the results that are committed here.

A page says where a table goes: it stands between ``<!-- begin mnist.errors -->`` and
``<!-- end mnist.errors -->``, where ``mnist`` is the name of a file of results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figure1 import NETWORKS
from figures import draw_figure1, draw_figure2, draw_figure3
from results import Results
from tables import (
    claims_table,
    error_table,
    figure1_table,
    gate_table,
    machine_line,
    settings_table,
    study_table,
)

_BLOCK = re.compile(r"(<!-- begin ([\w-]+)\.(\w+) -->\n).*?(<!-- end \2\.\3 -->)", re.DOTALL)

_OF_RESULTS: dict[str, Callable[[Results], str]] = {
    "machine": machine_line,
    "errors": error_table,
    "claims": claims_table,
    "gates": gate_table,
}
_OF_JSON: dict[str, Callable[[Any], str]] = {
    "found": figure1_table,
    "settings": settings_table,
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


def pictures_of(page: str) -> list[str]:
    """Names of the results whose pictures a page shows, as ``(paper/mnist.png)``."""
    return re.findall(r"\(paper/([\w-]+)\.png\)", page)


def draw(file: Path, picture: Path) -> None:
    """Draw the picture of a file of results."""
    data = json.loads(file.read_text())
    if "networks" in data:
        figure = draw_figure1(data)
    elif (found := Results.from_json(file.read_text())).task == "bessel":
        shown = [run for run in found.runs if run["row"] in NETWORKS]  # as in the paper
        figure = draw_figure2(shown or found.runs)
    else:
        figure = draw_figure3(found)
    figure.savefig(picture, dpi=100)
