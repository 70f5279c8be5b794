"""What all pictures share: figures of the right size, labels that do not overlap, colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"kept": "#0072B2", "mixed": "#C8C8C8", "transferred": "#E69F00"}
LABEL_INCHES = 0.16  # one line of 8 point text and its spacing
_LONGEST_LABEL = 40


def axes_for_lines(lines: int, above: float) -> Axes:
    """Axes of a new figure that has room for the lines of labels, and inches above them."""
    return new_axes(min(max(lines * (LABEL_INCHES + 0.04), 1.2), 14) + above)


def new_axes(inches: float) -> Axes:
    """Axes of a new figure of that height.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'transfer-surgery[plots]'") from error
    height = inches + 0.8
    figure = Figure(figsize=(8, height), layout="tight")
    figure.subplots_adjust(bottom=0.7 / height, top=1 - 0.1 / height)  # about what "tight" will do
    return figure.add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The figure that axes are in."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def height_of(ax: Axes) -> float:
    """The height of axes in inches."""
    return float(ax.get_position().height * figure_of(ax).get_figheight())


def row_labels(paths: Sequence[str], room: float) -> tuple[list[float], list[str]]:
    """Places and names of the rows; only every n-th row has one where all would overlap."""
    every = math.ceil(len(paths) / max(int(room / LABEL_INCHES), 1))
    chosen = range(0, len(paths), every)
    return list(chosen), [_shorten(paths[i]) for i in chosen]


def _shorten(path: str) -> str:
    """Keep the end of a long path, which tells sites apart."""
    return path if len(path) <= _LONGEST_LABEL else "…" + path[1 - _LONGEST_LABEL :]


def shades(number: int) -> list[Any]:
    """Colours from dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.1 + 0.8 * i / max(number - 1, 1)) for i in range(number)]
