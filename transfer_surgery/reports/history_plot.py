"""A picture of a history: a heat map over the steps, with strips above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from transfer_surgery.reports.axes import axes_for_lines, figure_of, height_of, row_labels
from transfer_surgery.reports.transfer_report import by_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from transfer_surgery.reports.history import History

_STRIP_INCHES = 0.7
_GAP_INCHES = 0.12
_STAGE_INCHES = 0.75


def plot_history(history: History, ax: Axes | None = None) -> Axes:
    """Draw the transferred share of each site over the steps, with E[z] and lr in strips above.

    Sites of one stage stand together, with a line between stages and their names at the side.

    Args:
        history: a history with at least one record; the value ``"lr"``, if it was recorded, gets
            a strip.
        ax: where to draw the heat map; the strips stand above it. By default a new figure, whose
            height depends on the number of sites.

    Returns:
        The axes of the heat map; ``ax.figure.savefig("transfer.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was recorded.

    Source:
        The strips at the top of Figure 3.
    """
    if not history.records:
        raise ValueError(
            "nothing was recorded yet: call history.record() in the training loop first."
        )
    # What stands above the heat map, and the rows in the order of their stages.
    reports = [record.report for record in history.records]
    strips: dict[str, Sequence[float | None]] = {"E[z]": [r.total.mean_gate for r in reports]}
    if "lr" in history.value_names():
        strips["lr"] = history.value("lr")
    sites = len(history.paths)
    stages = by_stage(history.stages, range(sites))
    rows = [i for members in stages.values() for i in members]
    above = (_STRIP_INCHES + _GAP_INCHES) * len(strips)
    ax = ax or axes_for_lines(sites, above)
    paths = [history.paths[i] for i in rows]
    ax.set_yticks(*row_labels(paths, room=height_of(ax) - above), fontsize=8)

    # The heat map: one row per site, the first one on top.
    steps = [record.step for record in history.records]
    shares = [[100 * report.rows[i].transferred for report in reports] for i in rows]
    borders = [i - 0.5 for i in range(sites + 1)]
    mesh = ax.pcolormesh(_column_edges(steps), borders, shares, vmin=0, vmax=100, cmap="viridis")
    ax.set(ylim=(sites - 0.5, -0.5), xlabel="step")

    # Strips, stages and colour bar take a part of its room.
    _draw_around(ax, mesh, steps, strips, stages)
    return ax


def _draw_around(
    ax: Axes,
    mesh: QuadMesh,
    steps: Sequence[float],
    strips: Mapping[str, Sequence[float | None]],
    stages: Mapping[str, Sequence[int]],
) -> None:
    """Draw strips, names of stages and a colour bar around the heat map, within its room."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable  # type: ignore[import-untyped]

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
    """A white line between stages, and the name of each one at the side."""
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


def _column_edges(steps: Sequence[float]) -> list[float]:
    """Borders of the columns: half-way between the steps."""
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    if not inner:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [2 * steps[0] - inner[0], *inner, 2 * steps[-1] - inner[-1]]
