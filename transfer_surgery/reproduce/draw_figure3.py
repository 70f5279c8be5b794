"""The picture of Figure 3: test error over the epochs, with E[z] and the learning rate above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transfer_surgery.reproduce.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure3"]

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
_TITLES = {
    "mnist": "MNIST (LeNet-5)",
    "resnet20": "CIFAR-10 (ResNet-20)",
    "resnet110": "CIFAR-10 (ResNet-110)",
    "bessel": "Bessel function",
}


def draw_figure3(experiments: Sequence[Results]) -> Figure:
    """Draw a column per experiment: the learning rate, E[z] and the test error of each network.

    Lines are means over seeds of the trainings that did not diverge.

    Args:
        experiments: at least one.

    Returns:
        The figure; ``figure.savefig("figure3.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.

    Source:
        Figure 3.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'transfer-surgery[plots]'") from error
    columns = len(experiments)
    figure = Figure(figsize=(7.5 * columns, 7), layout="constrained")
    axes = figure.subplots(3, columns, sharex="col", squeeze=False, height_ratios=(1, 1, 6))
    for column, results in zip(axes.T, experiments, strict=True):
        column[0].set_title(_TITLES[results.task])
        _draw_curves(column[0], column[1], column[2], results)
    return figure


def _draw_curves(lr_axes: Axes, gate_axes: Axes, error_axes: Axes, results: Results) -> None:
    ends = []
    for row in results.rows:
        colour, line = _LOOKS[row]
        curves = [run["curve"] for run in results.of(row) if run["diverged"] is None]
        if not curves:
            continue
        epochs = curves[0]["epoch"]
        look: dict[str, Any] = {"color": colour, "linestyle": line}
        if row == results.rows[0]:
            lr_axes.plot(epochs, curves[0]["lr"], color="black", linewidth=1.2)
        if "mean_gate" in curves[0]:
            gate_axes.plot(epochs, _mean(curves, "mean_gate"), linewidth=1.5, **look)
        scores = _mean(curves, "score")
        ends += scores[len(scores) // 2 :]
        soft = "->" in row
        error_axes.plot(epochs, scores, label=row, linewidth=2.2 if soft else 1.3, **look)
    lr_axes.set_ylabel("lr")
    gate_axes.set(ylabel="E[z]", ylim=(-0.08, 1.08), yticks=(0, 1))
    # The first epochs are far above: what matters is the second half.
    low, high = min(ends), max(ends)
    room = 0.15 * (high - low) + 1e-9
    error_axes.set(xlabel="epoch", ylim=(low - room, high + 3 * room))
    error_axes.set_ylabel("test MSE" if results.task == "bessel" else "test top-1 error (%)")
    error_axes.grid(linewidth=0.4)
    error_axes.legend(ncols=2, fontsize=9, loc="upper right")


def _mean(curves: Sequence[dict[str, list[float]]], name: str) -> list[float]:
    together = zip(*(curve[name] for curve in curves), strict=True)
    return [sum(values) / len(values) for values in together]
