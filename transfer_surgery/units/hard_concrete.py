"""Eq. 15 and 16: the rectified binary concrete distribution, its gradient in closed form.

Gates are small tensors: what a sample costs is the number of torch calls, in backward above all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.units.kernels.function import Function


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
    if eps is None:
        return _rectify(torch.sigmoid(log_alpha), stretch)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return _value(log_alpha, eps, temperature, stretch)
    result: Tensor = _HardConcrete.apply(log_alpha, eps, temperature, stretch)
    return result


def _rectify(v: Tensor, stretch: tuple[float, float]) -> Tensor:
    """Stretched from (0, 1) to (xi, zeta), and clamped to [0, 1] (Eq. 12)."""
    xi, zeta = stretch
    return (v * (zeta - xi) + xi).clamp(0.0, 1.0)


def _value(
    log_alpha: Tensor, eps: Tensor, temperature: float, stretch: tuple[float, float]
) -> Tensor:
    return _rectify(torch.sigmoid((log_alpha + torch.logit(eps)) / temperature), stretch)


class _HardConcrete(Function):
    @staticmethod
    def forward(
        log_alpha: Tensor, eps: Tensor, temperature: float, stretch: tuple[float, float]
    ) -> Tensor:
        return _value(log_alpha, eps, temperature, stretch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_alpha, _, ctx.temperature, ctx.stretch = inputs
        ctx.shape = log_alpha.shape
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        xi, zeta = ctx.stretch
        v = (z - xi) / (zeta - xi)
        slope = (zeta - xi) / ctx.temperature * v * (1 - v)
        grad = torch.where((z > 0) & (z < 1), grads[0] * slope, 0.0)
        return grad.sum_to_size(ctx.shape), None, None, None
