"""``a * f(w*x + c) + b``: an activation between two affine maps; only the input is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation

__all__ = ["Affine", "affine", "affine_gradients", "affine_value"]

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
        return affine_value(x, activation, *parameters)
    result: Tensor = _Affine.apply(x, activation, *parameters)
    return result


def affine_value(x: Tensor, f: Activation, *parameters: Tensor | None) -> Tensor:
    """`affine` as plain differentiable tensor code."""
    a, _, _, b = parameters
    return _multiply_add(f(_inner(x, *parameters)), a, b).to(x.dtype)


def affine_gradients(
    x: Tensor,
    f: Activation,
    parameters: Sequence[Tensor | None],
    grad: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the input and of ``(a, w, c, b)``, None where not needed.

    All parameters are shared by the same elements: ``a`` comes out of their sums.
    """
    a, w, c, b = parameters
    inner = _inner(x, *parameters)
    grad = grad.to(inner.dtype)
    by_inner = f.backward(grad, inner)  # without the factor a
    factor = w if a is None else a if w is None else a * w
    return (
        (by_inner if factor is None else by_inner * factor).to(x.dtype) if needed[0] else None,
        None if a is None or not needed[1] else (grad * f(inner)).sum_to_size(a.shape),
        None if w is None or not needed[2] else _times(a, (by_inner * x).sum_to_size(w.shape)),
        None if c is None or not needed[3] else _times(a, by_inner.sum_to_size(c.shape)),
        None if b is None or not needed[4] else grad.sum_to_size(b.shape),
    )


def _inner(x: Tensor, *parameters: Tensor | None) -> Tensor:
    _, w, c, _ = parameters
    # Not result_type, which torch.compile does not follow.
    dtypes = (torch.promote_types(x.dtype, p.dtype) for p in parameters if p is not None)
    wide = next(dtypes, x.dtype)
    return _multiply_add(x.to(wide), w, c)


def _multiply_add(x: Tensor, factor: Tensor | None, offset: Tensor | None) -> Tensor:
    """In one pass where all is of one dtype."""
    if factor is None or offset is None or not x.dtype == factor.dtype == offset.dtype:
        x = x if factor is None else x * factor
        return x if offset is None else x + offset
    return torch.addcmul(offset, x, factor)


def _times(factor: Tensor | None, x: Tensor) -> Tensor:
    return x if factor is None else factor * x


class _Affine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, f: Activation, *parameters: Tensor | None) -> Tensor:
        return affine_value(x, f, *parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.activation, *parameters = inputs
        ctx.save_for_backward(x, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        found = affine_gradients(x, ctx.activation, parameters, grads[0], needed)
        return found[0], None, *found[1:]
