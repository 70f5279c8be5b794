"""A picture of what one site computes over the inputs that it gets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfer_surgery._running import as_batches, explained, predict, prediction_mode
from transfer_surgery.reports.axes import COLOURS, new_axes, shades
from transfer_surgery.units import (
    GatedActivation,
    Numbers,
    fitted_value,
    gated_activations,
    watched_inputs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = 3.2


@torch.no_grad()
def plot_activation(
    model: nn.Module, path: str, batches: Iterable[Any], *, curves: int = 5, ax: Axes | None = None
) -> Axes:
    """Draw what a site computes over the inputs that it gets: source, target and gated curves.

    Args:
        model: a converted model; it is run in evaluation mode.
        path: the path of a unit in the model.
        batches: inputs without labels, as for `match_targets`.
        curves: number of gates that get a curve, spaced evenly from the lowest to the highest one.
        ax: where to draw; by default a new figure.

    Returns:
        The axes; ``ax.figure.savefig("activation.png")`` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model is not converted, it has no such unit, the unit does not run, or the
            unit's source takes further tensors.

    Examples:
        >>> from transfer_surgery import convert
        >>> x = torch.randn(64, 8)
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=x)
        >>> [line.get_label() for line in plot_activation(model, "0", [x]).lines]
        ['relu', 'sin', 'z = 1.00']
    """
    unit = dict(gated_activations(model)).get(path)
    if unit is None:
        known = ", ".join(path for path, _ in gated_activations(model))
        raise ValueError(f"the model has no unit {path!r}; its units are {known}.")
    if unit.source.operands:
        raise ValueError(
            f"{path}: {unit.source} takes further tensors, so it is not a single curve."
        )
    inputs = _inputs(model, unit, batches)
    if not inputs.numel():
        raise ValueError(f"{path}: the unit does not run on these batches.")
    if not bool(inputs.isfinite().all()):
        raise ValueError(f"{path}: NaN or infinity comes in there. Look for it in the batches.")
    ax = ax or new_axes(_INCHES)
    counts = ax.twinx()
    counts.hist(inputs.numpy(), bins=80, color="0.88")
    counts.set(yticks=[], ylabel="inputs")
    ax.set_zorder(counts.get_zorder() + 1)
    ax.patch.set_visible(False)
    x = torch.linspace(float(inputs.min()), float(inputs.max()), 400)
    source = unit.source(x)
    ax.plot(x, source, color=COLOURS["kept"], linewidth=2, label=str(unit.source))
    if unit.fitted is None:
        ax.plot(
            x, unit.target(x), color=COLOURS["transferred"], linewidth=2, label=str(unit.target)
        )
    z = unit.gate.predict().flatten().cpu()
    order = z.argsort()
    different = torch.unique(z).numel() if unit.fitted is None else z.numel()
    chosen = torch.linspace(0, len(z) - 1, min(curves, different)).round().int()
    for shade, gate in zip(shades(len(chosen)), order[chosen].tolist(), strict=True):
        target = fitted_value(x, unit.target, _numbers(unit, gate))
        curve = torch.lerp(target, source, z[gate])
        ax.plot(x, curve, color=shade, linewidth=1, label=f"z = {z[gate]:.2f}")
    ax.set(xlabel=f"input of {path}", ylabel="output")
    ax.legend(fontsize=8, frameon=False)
    return ax


def _inputs(model: nn.Module, unit: GatedActivation, batches: Iterable[Any]) -> Tensor:
    """Up to 20,000 inputs of a unit, without the outermost 0.2 percent."""
    seen: list[Tensor] = []

    def keep(unit: nn.Module, x: Tensor) -> None:
        seen.append(x.detach().float().flatten().cpu().clone())

    found = as_batches(batches, model)
    with watched_inputs([unit], keep), prediction_mode(model):
        for number, batch in enumerate(found):
            with explained(model, f"batches[{number}]", batch):
                predict(model, batch)
    values = torch.cat(seen) if seen else torch.zeros(0)
    values = values[:: math.ceil(len(values) / 20_000) or 1].sort().values
    cut = len(values) // 1000
    return values[cut : len(values) - cut]


def _numbers(unit: GatedActivation, gate: int) -> Numbers | None:
    """The numbers of one gate's target."""
    if unit.fitted is None:
        return None
    return tuple(p.flatten()[gate].cpu() for p in unit.fitted.whole())
