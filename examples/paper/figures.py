"""The pictures of Figures 1 to 3, from results that are plain JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from figure1 import grid, loss, neuron
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results, Run
from tasks import Bessel

# A hue per source activation, as far as colour-blind readers tell them apart (Okabe and Ito);
# solid where the transfer is soft, as in the paper.
_LOOKS = {
    "sin": ("#000000", ":"),
    "resin": ("#0072B2", "--"),
    "tanh": ("#009E73", "--"),
    "relu": ("#D55E00", "--"),
    "Copy": ("#56B4E9", ":"),
    "Line": ("#CC79A7", ":"),
    "Bern": ("#E69F00", ":"),
    "resin->sin": ("#0072B2", "-"),
    "tanh->sin": ("#009E73", "-"),
    "relu->sin": ("#D55E00", "-"),
}
# Figures 1 and 2 show three networks, one a panel; other networks share a colour there.
_COLOURS = {"resin": "#0072B2", "sin": "#D55E00", "resin->sin": "#009E73"}
_OTHER_COLOUR = "#CC79A7"
_GATES = {"resin": (1.0,), "sin": (0.0,), "resin->sin": (1.0, 0.75, 0.5, 0.25, 0.0)}
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
_TITLES = {
    "mnist": "MNIST (LeNet-5)",
    "resnet20": "CIFAR-10 (ResNet-20)",
    "resnet110": "CIFAR-10 (ResNet-110)",
}
_FINE = 2001  # points of a curve


def draw_figure1(result: Mapping[str, Any]) -> Figure:
    """A row per network: on the left its fit of ``sin(2x)``, on the right the loss over w.

    Both are those of the first seed. Its trace lies on the loss of its gate at that step, computed
    on the grid of the training; for *resin->sin* the loss is drawn for five gates.
    """
    networks = result["networks"]
    figure = Figure(figsize=(11, 2.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, sharex="col", squeeze=False, width_ratios=(1, 1.1))
    for (left, right), (name, network) in zip(axes, networks.items(), strict=True):
        _draw_fit_of_neuron(left, name, network, result["settings"])
        _draw_space(right, name, network, result["settings"]["points"])
    axes[-1][0].set_xlabel("x")
    axes[-1][1].set_xlabel("w")
    return figure


def _draw_fit_of_neuron(
    ax: Axes, name: str, network: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
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
    ticks = [r"$-2\pi$", r"$-\pi$", "0", r"$\pi$", r"$2\pi$"]
    ax.set_xticks([torch.pi * i for i in range(-2, 3)], ticks)
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
    mark: dict[str, Any] = {"color": colour, "markeredgecolor": "black", "linestyle": ""}
    for at, marker, size, label in ((0, "o", 8, "start"), (-1, "*", 14, "end")):
        w, error = trace["w"][at], trace["loss"][at]
        ax.plot(w, error, marker, markersize=size, label=label, zorder=3, **mark)


def draw_figure2(runs: Iterable[Run]) -> Figure:
    """A panel per network: the samples, the Bessel function, and the fit of each seed.

    The fit of the first seed is the dark one. Trainings that diverged are counted in the title and
    have no fit.

    Raises:
        ValueError: there are no runs.
    """
    panels: dict[str, list[Run]] = {}
    for run in runs:
        panels.setdefault(run["row"], []).append(run)
    if not panels:
        raise ValueError("Figure 2 needs a run of at least one network; there are none.")
    figure = Figure(figsize=(12, 0.8 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, (name, seeds) in zip(axes, panels.items(), strict=True):
        _draw_samples(ax)
        _draw_fits(ax, name, sorted(seeds, key=lambda run: run["seed"]))
    axes[0].set(xlim=(-Bessel.end, Bessel.end), ylim=(-0.85, 1.15), yticks=(-0.5, 0, 0.5, 1))
    axes[-1].set_xlabel("x")
    return figure


def _draw_samples(ax: Axes) -> None:
    data = Bessel(torch.device("cpu"))
    x = torch.linspace(-data.end, data.end, _FINE, dtype=torch.float64)
    dots: dict[str, Any] = {"markersize": 3.5, "alpha": 0.45, "markeredgewidth": 0}
    samples = data.x_train.flatten(), data.y_train.flatten()
    ax.plot(*samples, "o", color="black", label="training samples", **dots)
    j0 = torch.special.bessel_j0(x)
    ax.plot(x, j0, color="black", linewidth=0.9, label="Bessel function $J_0$")
    ax.set_ylabel("f(x)")


def _draw_fits(ax: Axes, name: str, seeds: Sequence[Run]) -> None:
    ended = [run for run in seeds if run["diverged"] is None]
    colour = _COLOURS.get(name, _OTHER_COLOUR)
    other = "other seeds"  # once in the legend
    for run in reversed(ended):
        first = run is ended[0]
        x = torch.linspace(-Bessel.end, Bessel.end, len(run["fit"]), dtype=torch.float64)
        label = f"fit of seed {run['seed']}" if first else other
        look = {"alpha": 1.0 if first else 0.45, "linewidth": 1.8 if first else 1.2}
        ax.plot(x, run["fit"], color=colour, label=label, **look)
        other = ""
    ax.set_title(f"{name}: {_summary(seeds, ended)}", fontsize=10, loc="left")
    ax.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)


def _summary(seeds: Sequence[Run], ended: Sequence[Run]) -> str:
    """Such as "test MSE 0.00291 ± 0.00020 over 5 seeds"."""
    lost = f"{len(seeds) - len(ended)} of {len(seeds)} seeds diverged"
    if not ended:
        return lost
    errors = [run["conv"] for run in ended]
    text = f"test MSE {mean(errors):.5f}"
    if len(errors) > 1:
        text += f" ± {stdev(errors):.5f} over {len(errors)} seeds"
    return text if len(ended) == len(seeds) else f"{text}; {lost}"


def draw_figure3(results: Results) -> Figure:
    """The learning rate, E[z] and the test error of each network over the epochs.

    Lines are means over seeds of the trainings that did not diverge.
    """
    figure = Figure(figsize=(7.5, 7), layout="constrained")
    rates, gates, errors = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 6))
    rates.set_title(_TITLES[results.task])
    ends = []
    for row in results.rows:
        colour, line = _LOOKS[row]
        curves = [run["curve"] for run in results.of(row) if run["diverged"] is None]
        if not curves:
            continue
        epochs = curves[0]["epoch"]
        look: dict[str, Any] = {"color": colour, "linestyle": line}
        if not rates.lines:
            rates.plot(epochs, curves[0]["lr"], color="black", linewidth=1.2)
        if "mean_gate" in curves[0]:
            gates.plot(epochs, _mean(curves, "mean_gate"), linewidth=1.5, **look)
        scores = _mean(curves, "score")
        ends += scores[len(scores) // 2 :]
        errors.plot(epochs, scores, label=row, linewidth=2.2 if "->" in row else 1.3, **look)
    rates.set_ylabel("lr")
    gates.set(ylabel="E[z]", ylim=(-0.08, 1.08), yticks=(0, 1))
    # The first epochs are far above: what matters is the second half.
    low, high = min(ends), max(ends)
    room = 0.15 * (high - low) + 1e-9
    errors.set(xlabel="epoch", ylabel="test top-1 error (%)", ylim=(low - room, high + 3 * room))
    errors.grid(linewidth=0.4)
    errors.legend(ncols=2, fontsize=9, loc="upper right")
    return figure


def _mean(curves: Sequence[dict[str, list[float]]], name: str) -> list[float]:
    together = zip(*(curve[name] for curve in curves), strict=True)
    return [mean(values) for values in together]
