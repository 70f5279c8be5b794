"""Eq. 15: the sample of hard-concrete gates.

Gates per neuron with noise per example are as many as the input has elements. Evaluated as the
gated activation is, their sample keeps two tensors instead of one per operation, and is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_surgery.units.kernels.engine import Formula
from transfer_surgery.units.kernels.recomputed import is_transformed, recomputed

# Below this number of gates the calls take longer than the arithmetic, and memory is no matter.
_FEW = 4096


def hard_concrete(
    log_alpha: Tensor, eps: Tensor, temperature: float, stretch: tuple[float, float]
) -> Tensor:
    """``z`` of Eq. 15.

    Args:
        log_alpha: one number per gate, float32.
        eps: noise in (0, 1), of a shape that ``log_alpha`` broadcasts to.
        temperature: ``beta``.
        stretch: ``(xi, zeta)``.

    Examples:
        >>> hard_concrete(torch.zeros(3), torch.tensor([0.001, 0.5, 0.999]), 2 / 3, (-0.1, 1.1))
        tensor([0.0000, 0.5000, 1.0000])
    """
    formula = _Sample(temperature, stretch)
    if eps.numel() < _FEW or is_transformed(log_alpha, eps):
        return formula.plain(log_alpha, eps)
    return recomputed(formula, log_alpha, eps)


def rectified(v: Tensor, stretch: tuple[float, float]) -> Tensor:
    """Eq. 12: stretched to ``(xi, zeta)`` and cut to [0, 1], so that both ends are reached."""
    xi, zeta = stretch
    return (v * (zeta - xi) + xi).clamp(0.0, 1.0)


@dataclass(frozen=True)
class _Sample(Formula):
    temperature: float
    stretch: tuple[float, float]

    def __str__(self) -> str:
        return "the sample of hard-concrete gates"

    def plain(self, *tensors: Tensor) -> Tensor:
        log_alpha, eps = tensors
        logit = (log_alpha + torch.logit(eps)) / self.temperature
        return rectified(torch.sigmoid(logit), self.stretch)
