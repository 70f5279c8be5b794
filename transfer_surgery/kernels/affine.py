"""``a * f(w*x + c) + b``: an activation between two affine maps; only the input is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation

__all__ = ["Affine", "affine"]

Affine = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""``(a, w, c, b)``, of shapes that broadcast to that of the input; None: 1, 1, 0, 0."""


def affine(x: Tensor, activation: Activation, parameters: Affine) -> Tensor:
    """An activation with amplitude, frequency, phase and offset.

    The arithmetic is done in the wider one of the dtypes of `x` and of the parameters: in bfloat16
    a sine would see its argument off by up to 0.03 beyond 8.

    Args:
        x: input, any shape.
        activation: ``f``; without operands.
        parameters: ``(a, w, c, b)``; None: left out.

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


def _value(x: Tensor, f: Activation, *parameters: Tensor | None) -> Tensor:
    a, _, _, b = parameters
    y = f(_inner(x, *parameters))
    y = y if a is None else a * y
    return (y if b is None else y + b).to(x.dtype)


def _inner(x: Tensor, *parameters: Tensor | None) -> Tensor:
    _, w, c, _ = parameters
    wide = next((torch.result_type(x, p) for p in parameters if p is not None), x.dtype)
    x = x.to(wide) if w is None else w * x
    return x if c is None else x + c


class _Affine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, f: Activation, *parameters: Tensor | None) -> Tensor:
        return _value(x, f, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.activation, *parameters = inputs
        ctx.save_for_backward(x, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, w, c, b = ctx.saved_tensors
        f, needed = ctx.activation, ctx.needs_input_grad
        inner = _inner(x, a, w, c, b)
        grad = grads[0].to(inner.dtype)
        grad_inner = f.backward(grad if a is None else grad * a, inner)
        return (
            (grad_inner if w is None else grad_inner * w).to(x.dtype) if needed[0] else None,
            None,
            (grad * f(inner)).sum_to_size(a.shape) if needed[2] else None,
            (grad_inner * x).sum_to_size(w.shape) if needed[3] else None,
            grad_inner.sum_to_size(c.shape) if needed[4] else None,
            grad.sum_to_size(b.shape) if needed[5] else None,
        )
