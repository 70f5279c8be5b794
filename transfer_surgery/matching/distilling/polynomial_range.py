"""Polynomials beyond the range of their fit, while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

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
    """How far inputs leave the range of the polynomials that they go to.

    Args:
        units: those of a network; others than polynomials are left out.
    """

    def __init__(self, units: Sequence[GatedActivation]) -> None:
        self._units, self._polynomials = units, polynomials(units)
        self._squares: dict[GatedActivation, list[tuple[Tensor, int]]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, `penalty` counts what the polynomials get."""

        def count(unit: GatedActivation, x: Tensor) -> None:
            way = self._way(unit, x)
            self._squares.setdefault(unit, []).append((way.square().sum(), way.numel()))

        try:
            with self._shown(count):
                yield
        finally:
            self._squares.clear()

    def penalty(self) -> Tensor:
        """The mean squared way from the range, in halves of it, summed over sites; else 0.

        A site that is called several times has the mean over all of its calls.
        """
        found = []
        for calls in self._squares.values():
            squares, counts = zip(*calls, strict=True)
            found.append(torch.stack(squares).sum() / max(sum(counts), 1))
        return torch.stack(found).sum() if found else torch.zeros(())

    def look_within_bounds(self, examination: Examination) -> tuple[float, str]:
        """What bounded polynomials do with held-out inputs, where they overflow without bounds.

        Returns:
            The loss, and for messages the sites whose inputs leave the range furthest.

        Raises:
            ValueError: the outputs are not finite either, so that polynomials are not the cause.
        """
        furthest: dict[str, float] = {}

        def look(unit: GatedActivation, x: Tensor) -> None:
            if x.numel():
                way = self._way(unit, x).max().item()
                furthest[unit.path] = max(furthest.get(unit.path, 0.0), way)

        with polynomials_bounded(self._units), self._shown(look):
            loss = examination.loss()
        left = sorted((path for path in furthest if furthest[path] > 0), key=lambda p: -furthest[p])
        if loss == math.inf or not left:
            raise ValueError(
                "the outputs for the held-out batches are not finite: look for NaN in the batches."
            )
        rest = ", ..." if len(left) > _NAMED else ""
        return loss, ", ".join(f"{p} ({1 + furthest[p]:.3g} times)" for p in left[:_NAMED]) + rest

    def _shown(
        self, look: Callable[[GatedActivation, Tensor], object]
    ) -> AbstractContextManager[None]:
        return hooked(*(watch_inputs(unit, look) for unit in self._polynomials))

    def _way(self, unit: GatedActivation, x: Tensor) -> Tensor:
        """How far each input is outside of the range, in halves of it; 0 where the source stays."""
        _, w, c, *_ = self._polynomials[unit].expand(x)
        z = unit.granularity.expand(unit.gate.predict().detach(), x)
        # The range is from -1 to 1.
        return torch.where(z == 1, 0.0, (w * x + c).abs() - 1.0).clamp_min(0.0)
