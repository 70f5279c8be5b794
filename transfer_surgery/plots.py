"""Pictures of the transfer: reports as bars, a history as a heat map.

Figures are made without pyplot, so that drawing needs no display, chooses no backend and leaves no
figure open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from transfer_surgery.history import History
from transfer_surgery.match_report import MatchReport
from transfer_surgery.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "figure_of", "new_axes", "plot_history", "plot_match", "plot_report"]

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {"kept": "#0072B2", "mixed": "#C8C8C8", "transferred": "#E69F00"}
_LABEL_INCHES = 0.16  # one line of 8 point text and its spacing
_STRIP_INCHES = 0.7
_GAP_INCHES = 0.12
_LONGEST_LABEL = 40


def plot_report(report: Report, ax: Axes | None = None) -> Figure:
    """Draw the shares of kept, mixed and transferred gates as one stacked bar per site.

    Args:
        report: what `transfer_surgery.report` returned.
        ax: where to draw; by default a new figure, as high as the number of sites asks for.

    Returns:
        The figure; ``figure.savefig("report.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from transfer_surgery.report import Row
        >>> row = Row("act", "relu", "sin", "channel", 8, 8, 6, 0.25, 0.5, 0.25, 0.6, 2.0)
        >>> figure = plot_report(Report((row,), row))
        >>> [bar.get_label() for bar in figure.axes[0].containers]
        ['kept', 'mixed', 'transferred']
    """
    rows = (*report.rows, report.total)
    ax = ax or _axes_for(len(rows), above=0.6)
    positions = [*range(len(report)), len(report) + 0.5]  # the total stands a little apart
    left = [0.0] * len(rows)
    for name, colour in COLOURS.items():
        widths = [100 * getattr(row, name) for row in rows]
        ax.barh(positions, widths, height=0.8, left=left, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    places, names = _labels([row.path for row in report], room=_inches(ax) - _LABEL_INCHES)
    ax.set_yticks([*places, positions[-1]], [*names, "total"], fontsize=8)
    ax.set(xlim=(0, 100), ylim=(positions[-1] + 0.6, -0.6), xlabel="share of the gates (%)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure_of(ax)


def plot_history(history: History, ax: Axes | None = None) -> Figure:
    """Draw the transferred share of each site over the steps, with E[z] and lr in strips above.

    Args:
        history: at least one record; its value ``"lr"``, where recorded, gets a strip.
        ax: where to draw the heat map; the strips stand above it. By default a new figure, as high
            as the number of sites asks for.

    Returns:
        The figure; ``figure.savefig("transfer.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was recorded.

    Source:
        The strips at the top of Figure 3.
    """
    if not history.records:
        raise ValueError("nothing recorded yet: call history.record() in the training loop first.")
    strips: dict[str, Sequence[float | None]] = {"E[z]": [r.total_gate for r in history.records]}
    if "lr" in history.value_names():
        strips["lr"] = history.value("lr")
    sites = len(history.paths)
    above = (_STRIP_INCHES + _GAP_INCHES) * len(strips)
    ax = ax or _axes_for(sites, above)
    ax.set_yticks(*_labels(history.paths, room=_inches(ax) - above), fontsize=8)
    steps = [record.step for record in history.records]
    shares = [[100 * record.transferred[i] for record in history.records] for i in range(sites)]
    rows = [i - 0.5 for i in range(sites + 1)]
    mesh = ax.pcolormesh(_edges(steps), rows, shares, vmin=0, vmax=100, cmap="viridis")
    ax.set(ylim=(sites - 0.5, -0.5), xlabel="step")
    _draw_around(ax, mesh, steps, strips)
    return figure_of(ax)


def plot_match(report: MatchReport, ax: Axes | None = None) -> Figure:
    """Draw how well targets were matched: R2, periods and KL of each site, side by side.

    Args:
        report: what `transfer_surgery.match_targets` returned.
        ax: where to draw R2; the others are cut out of its room. By default a new figure, as high
            as the number of sites asks for.

    Returns:
        The figure; ``figure.savefig("match.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from transfer_surgery.match_report import MatchRow
        >>> figure = plot_match(MatchReport((MatchRow("act", "relu", "sin", 0.97, 0.8, 0.01),)))
        >>> [ax.get_xlabel() for ax in figure.axes]
        ['R2', 'periods', 'KL']
    """
    rows = report.rows
    ax = ax or _axes_for(len(rows), above=0.1)
    from mpl_toolkits.axes_grid1 import make_axes_locatable  # type: ignore[import-untyped]

    ax.set_yticks(*_labels([row.path for row in rows], room=_inches(ax)), fontsize=8)
    divider = make_axes_locatable(ax)
    for name, values in (
        ("R2", [row.r2 for row in rows]),
        ("periods", [row.periods for row in rows]),
        ("KL", [row.divergence for row in rows]),
    ):
        panel = ax
        if name != "R2":
            panel = divider.append_axes("right", size="100%", pad=0.3, sharey=ax)
            panel.tick_params(labelleft=False)
        known = [(i, value) for i, value in enumerate(values) if value is not None]
        places = [i for i, _ in known]
        panel.barh(places, [value for _, value in known], height=0.8, color=COLOURS["kept"])
        panel.set(xlabel=name, ylim=(len(rows) - 0.5, -0.5))
        panel.grid(axis="x", linewidth=0.4)
    lowest = min((row.r2 for row in rows if row.r2 is not None), default=0.0)
    ax.set_xlim(min(0.0, lowest), 1)
    return figure_of(ax)


def _draw_around(
    ax: Axes, mesh: QuadMesh, steps: Sequence[float], strips: dict[str, Sequence[float | None]]
) -> None:
    """Cut a colour bar and one narrow line plot per strip, of fixed size, out of the axes' room."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    divider = make_axes_locatable(ax)
    for name, values in strips.items():
        strip = divider.append_axes("top", size=_STRIP_INCHES, pad=_GAP_INCHES, sharex=ax)
        known = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
        marker = "." if len(known) == 1 else ""  # one point makes no line
        strip.plot(*zip(*known, strict=True), color="black", linewidth=1.2, marker=marker)
        strip.set_ylabel(name, rotation=0, ha="right", va="center")
        strip.tick_params(labelbottom=False, labelsize=8)
        strip.grid(axis="y", linewidth=0.4)
        if name == "E[z]":
            strip.set(ylim=(-0.08, 1.08), yticks=(0, 1))
    bar = divider.append_axes("right", size=0.15, pad=_GAP_INCHES)
    figure_of(ax).colorbar(mesh, cax=bar, label="transferred (%)")


def _axes_for(lines: int, above: float) -> Axes:
    """Axes of a new figure with room for so many lines of labels, and inches above them."""
    return new_axes(min(max(lines * (_LABEL_INCHES + 0.04), 1.2), 14) + above)


def new_axes(inches: float) -> Axes:
    """Axes of a new figure, so high.

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


def _inches(ax: Axes) -> float:
    return float(ax.get_position().height * figure_of(ax).get_figheight())


def _labels(paths: Sequence[str], room: float) -> tuple[list[float], list[str]]:
    """Places and names of the rows 0, 1, ...; every n-th where all would overlap in the inches."""
    every = math.ceil(len(paths) / max(int(room / _LABEL_INCHES), 1))
    chosen = range(0, len(paths), every)
    return list(chosen), [_shorten(paths[i]) for i in chosen]


def _shorten(path: str) -> str:
    """Keep the end of a long path, which tells sites apart."""
    return path if len(path) <= _LONGEST_LABEL else "…" + path[1 - _LONGEST_LABEL :]


def _edges(steps: Sequence[float]) -> list[float]:
    """Borders of the columns: half-way between steps, the outer ones symmetric."""
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    if not inner:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [2 * steps[0] - inner[0], *inner, 2 * steps[-1] - inner[-1]]
