"""``a * f(w*x + c) + b``: an activation between two affine maps; only the input is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation

__all__ = ["Affine", "affine"]

Affine = tuple[Tensor, Tensor, Tensor, Tensor]
"""``(a, w, c, b)``, of shapes that broadcast to that of the input."""


def affine(x: Tensor, activation: Activation, parameters: Affine) -> Tensor:
    """An activation with amplitude, frequency, phase and offset.

    The arithmetic is done in the wider one of the dtypes of `x` and of the parameters: in bfloat16
    a sine would see its argument off by up to 0.03 beyond 8.

    Args:
        x: input, any shape.
        activation: ``f``; without operands.
        parameters: ``(a, w, c, b)``.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Example:
        >>> from transfer_surgery.activations import get_activation
        >>> two, one, zero = torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.0)
        >>> affine(torch.tensor([-3.0, 3.0]), get_activation("relu"), (two, one, zero, one))
        tensor([1., 7.])
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return _value(x, activation, *parameters)
    result: Tensor = _Affine.apply(x, activation, *parameters)
    return result


def _value(x: Tensor, f: Activation, a: Tensor, w: Tensor, c: Tensor, b: Tensor) -> Tensor:
    return (a * f(w * x + c) + b).to(x.dtype)


class _Affine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, f: Activation, a: Tensor, w: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return _value(x, f, a, w, c, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.activation, a, w, c, b = inputs
        ctx.save_for_backward(x, a, w, c, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, w, c, b = ctx.saved_tensors
        f, needed = ctx.activation, ctx.needs_input_grad
        inner = w * x + c
        grad = grads[0].to(inner.dtype)
        grad_inner = f.backward(grad * a, inner)
        return (
            (grad_inner * w).to(x.dtype) if needed[0] else None,
            None,
            (grad * f(inner)).sum_to_size(a.shape) if needed[2] else None,
            (grad_inner * x).sum_to_size(w.shape) if needed[3] else None,
            grad_inner.sum_to_size(c.shape) if needed[4] else None,
            grad.sum_to_size(b.shape) if needed[5] else None,
        )
