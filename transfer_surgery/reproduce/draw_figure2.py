"""The picture of Figure 2: what each network makes of 200 noisy samples of the Bessel function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch

from transfer_surgery.reproduce.tasks import Bessel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure2"]

Run = Mapping[str, Any]

# Those of Figure 1, and others of Okabe and Ito's palette for networks that the paper leaves out.
_COLOURS = {"resin": "#0072B2", "sin": "#D55E00", "resin->sin": "#009E73"}
_OTHER_COLOUR = "#CC79A7"
_FINE = 2001  # points of the Bessel function


def draw_figure2(runs: Iterable[Run]) -> Figure:
    """Draw a panel per network: the samples, the Bessel function, and the fit of each seed.

    The fit of the first seed is the dark one. Trainings that diverged are counted in the title and
    have no fit.

    Args:
        runs: what `transfer_surgery.reproduce.trainer.Training.result` returned of the task
            ``"bessel"``, and its ``"seed"``; any networks, one panel each in the order given, any
            number of seeds.

    Returns:
        The figure; ``figure.savefig("figure2.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no runs.

    Source:
        Figure 2.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'transfer-surgery[plots]'") from error
    panels: dict[str, list[Run]] = {}
    for run in runs:
        panels.setdefault(run["row"], []).append(run)
    if not panels:
        raise ValueError("Figure 2 needs a run of at least one network; there are none.")
    figure = Figure(figsize=(12, 0.8 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, (name, seeds) in zip(axes, panels.items(), strict=True):
        _draw_data(ax)
        _draw_fits(ax, name, sorted(seeds, key=lambda run: run["seed"]))
    axes[0].set(xlim=(-Bessel.end, Bessel.end), ylim=(-0.85, 1.15), yticks=(-0.5, 0, 0.5, 1))
    axes[-1].set_xlabel("x")
    return figure


def _draw_data(ax: Axes) -> None:
    data = Bessel(torch.device("cpu"))
    x = torch.linspace(-data.end, data.end, _FINE, dtype=torch.float64)
    ax.plot(
        data.x_train.flatten(),
        data.y_train.flatten(),
        "o",
        markersize=3.5,
        color="black",
        alpha=0.45,
        markeredgewidth=0,
        label="training samples",
    )
    ax.plot(
        x, torch.special.bessel_j0(x), color="black", linewidth=0.9, label="Bessel function $J_0$"
    )
    ax.set_ylabel("f(x)")


def _draw_fits(ax: Axes, name: str, seeds: Sequence[Run]) -> None:
    ended = [run for run in seeds if run["diverged"] is None]
    colour = _COLOURS.get(name, _OTHER_COLOUR)
    other = "other seeds"  # once in the legend
    for run in reversed(ended):
        first = run is ended[0]
        grid = torch.linspace(-Bessel.end, Bessel.end, len(run["fit"]), dtype=torch.float64)
        ax.plot(
            grid,
            run["fit"],
            color=colour,
            alpha=1.0 if first else 0.45,
            linewidth=1.8 if first else 1.2,
            label=f"fit of seed {run['seed']}" if first else other,
        )
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
