"""Pictures of the transfer: reports as bars, a history as a heat map.

Figures are made without pyplot, so that drawing needs no display, chooses no backend and leaves no
figure open. Each function returns the axes that it drew in; ``ax.figure`` holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

    from transfer_surgery.matching import MatchReport
    from transfer_surgery.reports.history import History
    from transfer_surgery.reports.transfer_report import Report

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {"kept": "#0072B2", "mixed": "#C8C8C8", "transferred": "#E69F00"}
_LABEL_INCHES = 0.16  # one line of 8 point text and its spacing
_STRIP_INCHES = 0.7
_GAP_INCHES = 0.12
_STAGE_INCHES = 0.75
_LONGEST_LABEL = 40


def plot_report(report: Report, ax: Axes | None = None) -> Axes:
    """Draw the shares of kept, mixed and transferred gates as one stacked bar per site.

    Args:
        report: what `transfer_surgery.report` returned.
        ax: where to draw; by default a new figure, as high as the number of sites asks for.

    Returns:
        The axes; ``ax.figure.savefig("report.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from transfer_surgery.reports.transfer_report import Row
        >>> row = Row("act", "relu", "sin", "channel", 8, 8, 6, 0.25, 0.5, 0.25, 0.6, 2.0)
        >>> ax = plot_report(Report((row,), row))
        >>> [bar.get_label() for bar in ax.containers]
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
    return ax


def plot_history(history: History, ax: Axes | None = None) -> Axes:
    """Draw the transferred share of each site over the steps, with E[z] and lr in strips above.

    Sites of one stage stand together, with a line between stages and their names at the side.

    Args:
        history: at least one record; its value ``"lr"``, where recorded, gets a strip.
        ax: where to draw the heat map; the strips stand above it. By default a new figure, as high
            as the number of sites asks for.

    Returns:
        The axes of the heat map; ``ax.figure.savefig("transfer.png")`` writes the picture.

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
    stages = _stages(history)
    rows = [i for members in stages.values() for i in members]
    above = (_STRIP_INCHES + _GAP_INCHES) * len(strips)
    ax = ax or _axes_for(sites, above)
    paths = [history.paths[i] for i in rows]
    ax.set_yticks(*_labels(paths, room=_inches(ax) - above), fontsize=8)
    steps = [record.step for record in history.records]
    shares = [[100 * record.transferred[i] for record in history.records] for i in rows]
    borders = [i - 0.5 for i in range(sites + 1)]
    mesh = ax.pcolormesh(_edges(steps), borders, shares, vmin=0, vmax=100, cmap="viridis")
    ax.set(ylim=(sites - 0.5, -0.5), xlabel="step")
    _draw_around(ax, mesh, steps, strips, stages)
    return ax


def plot_match(report: MatchReport, ax: Axes | None = None) -> Axes:
    """Draw how well targets were matched: R2, periods and KL of each site, side by side.

    Args:
        report: what `transfer_surgery.match_targets` returned.
        ax: where to draw R2; the others are cut out of its room. By default a new figure, as high
            as the number of sites asks for.

    Returns:
        The axes of R2; ``ax.figure.savefig("match.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from transfer_surgery.matching.match_report import MatchRow
        >>> ax = plot_match(MatchReport((MatchRow("act", "relu", "sin", 0.97, 0.8, 0.01, 512),)))
        >>> [ax.get_xlabel() for ax in ax.figure.axes]
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
    return ax


def _stages(history: History) -> dict[str, list[int]]:
    """The sites of each stage, by number, stages in the order in which they come up."""
    stages: dict[str, list[int]] = {}
    for i, stage in enumerate(history.stages):
        stages.setdefault(stage, []).append(i)
    return stages


def _draw_around(
    ax: Axes,
    mesh: QuadMesh,
    steps: Sequence[float],
    strips: Mapping[str, Sequence[float | None]],
    stages: Mapping[str, Sequence[int]],
) -> None:
    """Cut what stands around the heat map out of its room: strips, stages and a colour bar."""
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
    if 1 < len(stages) < sum(map(len, stages.values())):
        _draw_stages(ax, divider.append_axes("right", size=_STAGE_INCHES, pad=0.03), stages)
    bar = divider.append_axes("right", size=0.15, pad=_GAP_INCHES)
    figure_of(ax).colorbar(mesh, cax=bar, label="transferred (%)")


def _draw_stages(ax: Axes, side: Axes, stages: Mapping[str, Sequence[int]]) -> None:
    """A white line under each stage but the last, and its name at the side, where there is room."""
    side.set(ylim=ax.get_ylim(), xlim=(0, 1))
    side.set_axis_off()
    first = 0
    for stage, members in stages.items():
        if first:
            ax.axhline(first - 0.5, color="white", linewidth=1.5)
        side.plot([0.06, 0.06], [first - 0.4, first + len(members) - 0.6], color="0.4", linewidth=2)
        middle = first + (len(members) - 1) / 2
        side.text(0.16, middle, stage, fontsize=8, va="center", clip_on=False)
        first += len(members)


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
