"""Pictures of reports as bars, and of gates as a histogram.

Figures are made without pyplot, so that drawing needs no display, chooses no backend and leaves no
figure open. Each function returns the axes that it drew in; ``ax.figure`` holds them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transfer_surgery.reports.axes import (
    COLOURS,
    LABEL_INCHES,
    axes_for_lines,
    height_of,
    new_axes,
    row_labels,
    shades,
)
from transfer_surgery.units import gated_activations, stage_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from transfer_surgery.matching import MatchReport
    from transfer_surgery.reports.transfer_report import Report

_HISTOGRAM_INCHES = 3.2


def plot_report(report: Report, ax: Axes | None = None) -> Axes:
    """Draw the shares of kept, mixed and transferred gates as one stacked bar per site.

    Args:
        report: what `transfer_surgery.report` returned.
        ax: where to draw; by default a new figure, whose height depends on the number of sites.

    Returns:
        The axes; ``ax.figure.savefig("report.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from transfer_surgery.reports import Report, ReportRow
        >>> row = ReportRow("act", "relu", "sin", "channel", 8, 8, 6, 0.25, 0.5, 0.25, 0.6, 2.0)
        >>> ax = plot_report(Report((row,), row))
        >>> [bar.get_label() for bar in ax.containers]
        ['kept', 'mixed', 'transferred']
    """
    rows = (*report.rows, report.total)
    ax = ax or axes_for_lines(len(rows), above=0.6)
    positions = [*range(len(report)), len(report) + 0.5]  # the total stands a little apart
    left = [0.0] * len(rows)
    for name, colour in COLOURS.items():
        widths = [100 * getattr(row, name) for row in rows]
        ax.barh(positions, widths, height=0.8, left=left, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    places, names = row_labels([row.path for row in report], room=height_of(ax) - LABEL_INCHES)
    ax.set_yticks([*places, positions[-1]], [*names, "total"], fontsize=8)
    ax.set(xlim=(0, 100), ylim=(positions[-1] + 0.6, -0.6), xlabel="share of the gates (%)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return ax


def plot_match(report: MatchReport, ax: Axes | None = None) -> Axes:
    """Draw how well targets were matched: R2, periods and the largest output error of each site.

    Args:
        report: what `transfer_surgery.match_targets` returned.
        ax: where to draw R2; the other two take a part of its room. By default a new figure, whose
            height depends on the number of sites.

    Returns:
        The axes of R2; ``ax.figure.savefig("match.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from transfer_surgery.matching import MatchReport, MatchRow
        >>> ax = plot_match(
        ...     MatchReport((MatchRow("act", "relu", "sin", 0.97, 0.8, {"0": 0.01}, 512),))
        ... )
        >>> [ax.get_xlabel() for ax in ax.figure.axes]
        ['R2', 'periods', 'output error']
    """
    rows = report.rows
    ax = ax or axes_for_lines(len(rows), above=0.1)
    from mpl_toolkits.axes_grid1 import make_axes_locatable  # type: ignore[import-untyped]

    ax.set_yticks(*row_labels([row.path for row in rows], room=height_of(ax)), fontsize=8)
    divider = make_axes_locatable(ax)
    for name, values in (
        ("R2", [row.r2 for row in rows]),
        ("periods", [row.periods for row in rows]),
        ("output error", [max(row.errors.values()) if row.errors else None for row in rows]),
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


def plot_gates(model: nn.Module, ax: Axes | None = None) -> Axes:
    """Draw a histogram of ``log_alpha`` over all gates, stage by stage on top of each other.

    Dashed lines mark where the prediction gate (Eq. 16) becomes exactly 0 and exactly 1, if all
    gates are hard-concrete ones with one stretch.

    Args:
        model: a converted model with learned gates.
        ax: where to draw; by default a new figure.

    Returns:
        The axes; ``ax.figure.savefig("gates.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model is not converted, or none of its gates has a ``log_alpha``.

    Examples:
        >>> from transfer_surgery import convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(2, 64))
        >>> plot_gates(model).get_xlabel()
        'log_alpha'
    """
    stages: dict[str, list[Tensor]] = {}
    stretches: set[tuple[float, float] | None] = set()
    for path, unit in gated_activations(model):
        if unit.gate.learned:
            log_alpha = unit.gate.full_log_alpha().detach().flatten().cpu()
            stages.setdefault(stage_of(path, unit), []).append(log_alpha)
            stretches.add(getattr(unit.gate.settings, "stretch", None))
    if not stages:
        raise ValueError(
            "gates of the kinds line and copy have no log_alpha; use report(model).plot() instead."
        )
    ax = ax or new_axes(_HISTOGRAM_INCHES)
    values = [torch.cat(found).numpy() for found in stages.values()]
    ax.hist(values, bins=60, stacked=True, color=shades(len(values)), label=list(stages))
    stretch, *others = stretches
    if stretch is not None and not others:
        xi, zeta = stretch
        ends = math.log(-xi / zeta), math.log((1 - xi) / (zeta - 1))
        for end, text, side in zip(ends, ("gate 0", "gate 1"), ("right", "left"), strict=True):
            ax.axvline(end, color="black", linewidth=0.8, linestyle="--")
            top = ax.get_xaxis_transform()
            ax.text(end, 1.01, text, transform=top, fontsize=8, ha=side, va="bottom")
    ax.set(xlabel="log_alpha", ylabel="gates")
    ax.legend(fontsize=8, frameon=False, ncols=math.ceil(len(stages) / 10))
    return ax
