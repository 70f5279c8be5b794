"""Eq. 15 and 16: the rectified binary concrete distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def hard_concrete(
    log_alpha: Tensor, eps: Tensor | None, temperature: float, stretch: tuple[float, float]
) -> Tensor:
    """``z`` of Eq. 15, or of Eq. 16 without noise.

    Args:
        log_alpha: locations, float32.
        eps: noise in (0, 1), of a shape that broadcasts with that of ``log_alpha``; None: no noise.
        temperature: ``beta``.
        stretch: ``(xi, zeta)``.

    Examples:
        >>> hard_concrete(torch.zeros(3), torch.tensor([0.001, 0.5, 0.999]), 2 / 3, (-0.1, 1.1))
        tensor([0.0000, 0.5000, 1.0000])
    """
    logit = log_alpha if eps is None else (log_alpha + torch.logit(eps)) / temperature
    xi, zeta = stretch
    return (torch.sigmoid(logit) * (zeta - xi) + xi).clamp(0.0, 1.0)  # Eq. 12
