"""``a * f(w*x + c) + b``: an activation between two affine maps; only the input is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation
from transfer_surgery.units.kernels.function import Function
from transfer_surgery.units.kernels.pieces import Results, by_pieces

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

    Examples:
        >>> from transfer_surgery import get_activation
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
    if not parameters:
        return f(x)
    return affine_outer(f(affine_inner(x, *parameters)), *parameters).to(x.dtype)


def affine_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """In which the arithmetic is done."""
    # Not result_type, which torch.compile does not follow.
    dtypes = (torch.promote_types(x.dtype, p.dtype) for p in parameters if p is not None)
    return next(dtypes, x.dtype)


def affine_inner(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """``w*x + c``."""
    _, w, c, _ = parameters or _NONE
    return _multiply_add(x.to(affine_dtype(x, *parameters)), w, c)


def affine_outer(y: Tensor, *parameters: Tensor | None) -> Tensor:
    """``a*y + b``."""
    a, _, _, b = parameters or _NONE
    return _multiply_add(y, a, b)


def affine_gradients(
    x: Tensor,
    f: Activation,
    parameters: Sequence[Tensor | None],
    grad: Tensor,
    needed: Sequence[bool],
    value: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the input and of ``(a, w, c, b)``, None where not needed.

    All parameters are shared by the same elements: ``a`` comes out of their sums. That of the input
    is left in the dtype of the arithmetic. ``value`` is ``f(w*x + c)`` where that is known.
    """
    a, w, c, b = parameters or _NONE
    of_x, of_a, of_w, of_c, of_b = needed if parameters else (*needed, *[False] * 4)
    inner = affine_inner(x, *parameters)
    grad = grad.to(inner.dtype)
    result: list[Tensor | None] = [None] * (1 + len(parameters))
    if of_x or of_w or of_c:
        by_inner = f.backward(grad, inner)  # without the factor a
        if of_x:
            factor = w if a is None else a if w is None else a * w
            result[0] = by_inner if factor is None else by_inner * factor
        if of_w and w is not None:
            result[2] = _times(a, (by_inner * x).sum_to_size(w.shape))
        if of_c and c is not None:
            result[3] = _times(a, by_inner.sum_to_size(c.shape))
    if of_a and a is not None:
        result[1] = (grad * (f(inner) if value is None else value)).sum_to_size(a.shape)
    if of_b and b is not None:
        result[4] = grad.sum_to_size(b.shape)
    return tuple(result)


_NONE: Affine = (None, None, None, None)


def _multiply_add(x: Tensor, factor: Tensor | None, offset: Tensor | None) -> Tensor:
    """In one pass where all is of one dtype."""
    if factor is None or offset is None or not x.dtype == factor.dtype == offset.dtype:
        x = x if factor is None else x * factor
        return x if offset is None else x + offset
    return torch.addcmul(offset, x, factor)


def _times(factor: Tensor | None, x: Tensor) -> Tensor:
    return x if factor is None else factor * x


class _Affine(Function):
    @staticmethod
    def forward(x: Tensor, f: Activation, *parameters: Tensor | None) -> Tensor:
        (y,) = by_pieces(lambda x, *p: (affine_value(x, f, *p),), x, *parameters)
        assert y is not None
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.activation, *parameters = inputs
        ctx.save_for_backward(x, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])

        def gradients(x: Tensor, *others: Tensor | None) -> Results:
            *shared, grad = others
            assert grad is not None
            of_x, *rest = affine_gradients(x, ctx.activation, shared, grad, needed)
            return None if of_x is None else of_x.to(x.dtype), *rest

        of_x, *rest = by_pieces(gradients, x, *parameters, grads[0])
        return of_x, None, *rest
