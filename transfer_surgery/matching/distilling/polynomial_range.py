"""Polynomials beyond the range of their fit, while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from transfer_surgery._running import hooked
from transfer_surgery.matching.distilling.held_out import Examination
from transfer_surgery.units import GatedActivation, TargetParameters, watch_inputs

_NAMED = 5


def polynomials(units: Sequence[GatedActivation]) -> dict[GatedActivation, TargetParameters]:
    """The units whose fitted targets are polynomials, and the parameters of these."""
    found = {unit: unit.fitted for unit in units if unit.fitted is not None}
    return {unit: fitted for unit, fitted in found.items() if fitted.k is not None}


@contextmanager
def polynomials_bounded(units: Sequence[GatedActivation]) -> Iterator[None]:
    """Polynomials do not grow far beyond the range of their fit, as in training mode."""
    for unit in units:
        unit.bounded = True
    try:
        yield
    finally:
        for unit in units:
            unit.bounded = False


class FittedRanges:
    """How far inputs leave the range of the polynomials that they go to, while this is watched.

    Args:
        units: those of a network; others than polynomials are left out.
    """

    def __init__(self, units: Sequence[GatedActivation]) -> None:
        self._units, self._polynomials = units, polynomials(units)
        self._last: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, the last inputs are looked at."""

        def look(unit: GatedActivation, x: Tensor) -> None:
            _, w, c, *_ = self._polynomials[unit].expand(x)
            z = unit.granularity.expand(unit.gate.predict().detach(), x)
            # The range is from -1 to 1.
            self._last[unit.path] = torch.where(z == 1, 0.0, (w * x + c).abs() - 1.0).clamp_min(0.0)

        with hooked(*(watch_inputs(unit, look) for unit in self._polynomials)):
            yield
        self._last.clear()

    def penalty(self) -> Tensor:
        """The mean squared way from the range, in halves of it, summed over sites; else 0."""
        found = [way.square().mean() for way in self._last.values()]
        return torch.stack(found).sum() if found else torch.zeros(())

    def look_within_bounds(self, examination: Examination) -> tuple[float, str]:
        """What bounded polynomials do with held-out inputs, where they overflow without bounds.

        Returns:
            The loss, and for messages the sites whose inputs leave the range furthest.

        Raises:
            ValueError: the outputs are not finite either, so that polynomials are not the cause.
        """
        with polynomials_bounded(self._units), self.watched():
            loss = examination.loss()
            ways = {path: way.max().item() for path, way in self._last.items()}
        left = sorted((path for path in ways if ways[path] > 0), key=lambda path: -ways[path])
        if loss == math.inf or not left:
            raise ValueError(
                "the outputs for the held-out batches are not finite: look for NaN in the batches."
            )
        rest = ", ..." if len(left) > _NAMED else ""
        return loss, ", ".join(f"{p} ({1 + ways[p]:.3g} times)" for p in left[:_NAMED]) + rest
