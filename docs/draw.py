"""Draw the pictures of docs/concepts.md into docs/pictures.

python docs/draw.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from transfer_surgery import (
    GatedActivation,
    TransferSchedule,
    convert,
    get_activation,
    match_targets,
)
from transfer_surgery.activations import Activation
from transfer_surgery.reports import COLOURS, plot_activation
from transfer_surgery.units import make_gate

SHADES = ("#440154", "#31688e", "#35b779")


def panels(number: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4 * number, 2.9), layout="constrained")
    axes = list(figure.subplots(1, number, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(linewidth=0.3)
    return figure, axes


def draw_unit() -> Figure:
    figure, (ax,) = panels(1)
    x = torch.linspace(-5, 5, 400)
    relu, sin = get_activation("relu"), get_activation("sin")
    for z, shade in zip((0.75, 0.5, 0.25), SHADES, strict=True):
        ax.plot(x, z * relu(x) + (1 - z) * sin(x), color=shade, linewidth=1, label=f"z = {z}")
    ends: list[tuple[Activation, str]] = [(relu, "kept"), (sin, "transferred")]
    for function, colour in ends:
        ax.plot(x, function(x), color=COLOURS[colour], linewidth=2.2, label=str(function))
    ax.set(xlabel="x", ylabel="y", ylim=(-1.3, 3.5))
    ax.legend(fontsize=8, frameon=False)
    return figure


def draw_gate() -> Figure:
    figure, (left, right) = panels(2)
    location = torch.linspace(-8, 12, 401)
    gate = make_gate("hard_concrete", tuple(location.shape))
    gate.log_alpha.data = location
    gate.log_alpha.requires_grad_()
    probability = gate.probability()
    (slope,) = torch.autograd.grad(probability.sum(), gate.log_alpha)
    z, p = gate.predict().detach(), probability.detach()
    left.plot(location, z, color=COLOURS["kept"], linewidth=2, label="z in prediction (Eq. 16)")
    left.plot(location, p, color=COLOURS["transferred"], linewidth=2, label="P(z != 0) (Eq. 14)")
    left.set(xlabel="log_alpha", ylim=(-0.05, 1.3))
    left.legend(fontsize=8, frameon=False, loc="upper left")
    right.semilogy(location, slope, color="black", linewidth=1.5, label="slope of P(z != 0)")
    start = slope[(location - 8).abs().argmin()]
    right.plot(8, start, "o", color=COLOURS["kept"])
    right.annotate(f"start: {start:.1e}", (8, float(start)), (-3, -22), textcoords="offset points",
                   ha="right", fontsize=9)  # fmt: skip
    right.set(xlabel="log_alpha")
    right.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def draw_schedule() -> Figure:
    figure, (ax,) = panels(1)
    steps = range(1001)
    schedules = [
        ("all, 10 % to 70 %", TransferSchedule(1000)),
        ("half of them", TransferSchedule(1000, fraction=0.5)),
        ("linear, from the start", TransferSchedule(1000, start=0, end=1.0, shape="linear")),
    ]
    for (label, schedule), shade in zip(schedules, SHADES, strict=True):
        wanted = [100 * schedule.budget(step) for step in steps]
        ax.plot(steps, wanted, color=shade, linewidth=2, label=label)
    ax.set(
        xlabel="step of 1,000",
        ylabel="gates not transferred (%)",
        ylim=(-3, 118),
        yticks=range(0, 101, 25),
    )
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def draw_matched() -> Figure:
    """One channel of a network with batch norm, fitted to the inputs that it gets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1, momentum=None), nn.ReLU())
    images = smooth_images(64)
    model.train()(images)  # now batch norm knows them
    convert(model.eval(), example_input=images[:2])
    match_targets(model, [images])
    unit = model[2]
    assert isinstance(unit, GatedActivation)
    unit.gate.log_alpha.data.fill_(-8.0)
    figure, (ax,) = panels(1)
    plot_activation(model, "2", [images], ax=ax)
    ax.lines[-1].set(color=COLOURS["transferred"], linewidth=2, label="a*sin(w*x + c) + b")
    ax.set_xlabel("input of one channel, and how often it occurs (grey)")
    ax.legend(fontsize=8, frameon=False)
    return figure


def smooth_images(number: int) -> Tensor:
    return nn.functional.interpolate(torch.randn(number, 3, 8, 8), 32, mode="bilinear")


PICTURES = {
    "unit": draw_unit,
    "gate": draw_gate,
    "schedule": draw_schedule,
    "matched": draw_matched,
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]) if sys.argv[1:] else Path(__file__).with_name("pictures"))
