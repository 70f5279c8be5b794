"""The picture of Figure 1: what each network fits, and its way through its solution space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from transfer_surgery.reproduce.figure1 import grid, loss, neuron

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure1"]

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = {"resin": "#0072B2", "sin": "#D55E00", "resin->sin": "#009E73"}
_GATES = {"resin": (1.0,), "sin": (0.0,), "resin->sin": (1.0, 0.75, 0.5, 0.25, 0.0)}
_FINE = 2001  # points of a curve
# What cannot be seen at the scale of all: the barrier of resin before w = 0, 0.01 high, and the
# small minimum that sin does not leave.
_ZOOMS: dict[str, tuple[tuple[float, float, float, float], dict[str, Any]]] = {
    "resin": (
        (0.36, 0.16, 0.6, 0.5),
        {"xlim": (0.5, 6.5), "ylim": (1.464, 1.486), "yticks": (1.47, 1.48)},
    ),
    "sin": (
        (0.57, 0.12, 0.39, 0.4),
        {"xlim": (5.4, 6.8), "ylim": (0.96, 1.05), "yticks": (1.0, 1.04)},
    ),
}
_TICKS = [r"$-2\pi$", r"$-\pi$", "0", r"$\pi$", r"$2\pi$"]


def draw_figure1(result: Mapping[str, Any]) -> Figure:
    """Draw a row per network: on the left its fit of ``sin(2x)``, on the right loss over w.

    Both are those of the first seed. Its trace lies on the loss of its gate at that step, computed
    on the grid of the training; for *resin->sin* the loss is drawn for five gates.

    Args:
        result: what `transfer_surgery.reproduce.figure1.run_figure1` returned, or its JSON.

    Returns:
        The figure; ``figure.savefig("figure1.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.

    Source:
        Figure 1.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'transfer-surgery[plots]'") from error
    networks = result["networks"]
    figure = Figure(figsize=(11, 2.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, sharex="col", squeeze=False, width_ratios=(1, 1.1))
    for (fit_axes, space_axes), (name, network) in zip(axes, networks.items(), strict=True):
        _draw_fit(fit_axes, name, network, result["settings"])
        _draw_space(space_axes, name, network, result["settings"]["points"])
    axes[-1][0].set_xlabel("x")
    axes[-1][1].set_xlabel("w")
    return figure


def _draw_fit(ax: Axes, name: str, network: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    x, trace = grid(_FINE), network["trace"]
    w, z = (torch.tensor(trace[key][-1], dtype=torch.float64) for key in ("w", "z"))
    ax.plot(x, neuron(x, w, z), color=_COLOURS[name], linewidth=2.5, label=name)
    ax.plot(x, torch.sin(2 * x), color="black", linewidth=1, linestyle="--", label="sin(2x)")
    title = f"{name}: w = {w:.2f}, loss {trace['loss'][-1]:.2f}"
    # Without gate, mini-batches and jitter nothing is random: all seeds are the same training.
    if len(_GATES[name]) > 1 or settings["batch"] or settings["w_jitter"]:
        title += f"; {network['found']:.0%} of {len(network['w'])} seeds find sin(2x)"
    ax.set_title(title, fontsize=9, loc="left")
    ax.set(xlim=(x[0].item(), x[-1].item()), ylim=(-1.15, 1.6), yticks=(-1, 0, 1), ylabel="f(x)")
    ax.set_xticks([torch.pi * i for i in range(-2, 3)], _TICKS)
    ax.legend(loc="upper right", ncols=2, frameon=False, fontsize=9, borderaxespad=0.1)


def _draw_space(ax: Axes, name: str, network: Mapping[str, Any], points: int) -> None:
    trace = network["trace"]
    w = torch.linspace(min(-0.6, *trace["w"]) - 0.2, max(6.6, *trace["w"]) + 0.2, _FINE)
    curves = [(z, loss(w, torch.tensor(z), points)) for z in _GATES[name]]
    spaces = [ax]
    if name in _ZOOMS:
        place, limits = _ZOOMS[name]
        spaces.append(ax.inset_axes(place))
        spaces[1].set(**limits)
        spaces[1].tick_params(labelsize=8)
        ax.indicate_inset_zoom(spaces[1], edgecolor="black", alpha=0.4)
    for space in spaces:
        for z, values in curves:
            space.plot(w, values, color=str(0.1 + 0.6 * z), linewidth=1.2, label=f"z = {z:g}")
        _draw_trace(space, trace, _COLOURS[name])
    ax.set(xlim=(w[0].item(), w[-1].item()), ylim=(-0.12, 1.75), ylabel="loss")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, frameon=False)


def _draw_trace(ax: Axes, trace: Mapping[str, Sequence[float]], colour: str) -> None:
    ax.plot(trace["w"], trace["loss"], ".-", color=colour, markersize=4, linewidth=0.8)
    for at, marker, size, label in ((0, "o", 8, "start"), (-1, "*", 14, "end")):
        ax.plot(
            trace["w"][at],
            trace["loss"][at],
            marker,
            color=colour,
            markeredgecolor="black",
            markersize=size,
            linestyle="",
            label=label,
            zorder=3,
        )
