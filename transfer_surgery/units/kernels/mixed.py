"""Eq. 1 where gates are between 0 and 1: both branches; only the input and the gates are saved.

Source and target are evaluated again in backward. Blending is exact at both ends as long as both
branches are finite; where they are not, results are selected and no branch sees what the other one
choked on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation
from transfer_surgery.units.kernels.affine import (
    Affine,
    affine_dtype,
    affine_gradients,
    affine_inner,
    affine_outer,
    affine_value,
)
from transfer_surgery.units.kernels.function import Function
from transfer_surgery.units.kernels.pieces import Results, by_pieces, may_look


def mixed(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    parameters: Affine | None,
    ends: bool,
) -> Tensor:
    """``z * source(x) + (1 - z) * target(x)``, see `transfer_surgery.units.gated`.

    With ``ends`` some gates may be exactly 0 or 1.
    """
    result: Tensor = _Gated.apply(x, z, source, target, ends, *(parameters or ()))
    return result


def mix(s: Tensor, t: Tensor, z: Tensor, select: bool = True) -> Tensor:
    """Blend two tensors; with `select` the values of one are as they are where ``z`` is 0 or 1."""
    w, t = z.to(s.dtype), t.to(s.dtype)
    y = torch.lerp(t, s, w)
    return torch.where(w == 1, s, torch.where(w == 0, t, y)) if select else y


class _Gated(Function):
    @staticmethod
    def forward(
        x: Tensor,
        z: Tensor,
        source: Activation,
        target: Activation,
        ends: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        value = partial(_value, source=source, target=target, ends=ends)
        (y,) = by_pieces(value, x, z, *parameters)
        assert y is not None
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, z, ctx.source, ctx.target, ctx.ends, *parameters = inputs
        ctx.save_for_backward(x, z, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, *parameters = ctx.saved_tensors
        need_x, need_z, _, _, _, *need_parameters = ctx.needs_input_grad
        gradients = partial(
            _gradients,
            source=ctx.source,
            target=ctx.target,
            needed=(need_x, need_z, *need_parameters),
            ends=ctx.ends,
        )
        of_x, of_z, *of_parameters = by_pieces(gradients, x, z, *parameters, grads[0])
        return of_x, of_z, None, None, None, *of_parameters


def _careful(compute: Callable[[bool], Results], x: Tensor, ends: bool) -> Results:
    """``compute(select)``: blended where no gate is exact, or where the results are finite."""
    if ends and may_look(x):
        found = compute(False)
        if all(r is None or (may_look(r) and math.isfinite(r.sum().item())) for r in found):
            return found
    return compute(ends)


def _value(
    x: Tensor,
    z: Tensor,
    *parameters: Tensor | None,
    source: Activation,
    target: Activation,
    ends: bool,
) -> Results:
    s, t = source(x), affine_value(x, target, *parameters)
    return _careful(lambda select: (mix(s, t, z, select),), x, ends)


def _gradients(
    x: Tensor,
    z: Tensor,
    *others: Tensor | None,
    source: Activation,
    target: Activation,
    needed: Sequence[bool],
    ends: bool,
) -> Results:
    """Gradients of the input, the gates and the target's parameters."""
    *parameters, grad = others
    assert grad is not None

    def compute(select: bool) -> Results:
        def unless(end: int, tensor: Tensor) -> Tensor:
            """0 where the gates leave this branch out."""
            return torch.where(z == end, 0.0, tensor) if select else tensor

        grad_x = grad_z = value = None
        if needed[1]:
            value = target(affine_inner(x, *parameters))
            product = grad * (source(x) - affine_outer(value, *parameters))
            wide = torch.promote_types(product.dtype, torch.float32)
            grad_z = product.to(wide).sum_to_size(z.shape)
        wide = affine_dtype(x, *parameters)
        w = z.to(wide)
        by_target, *of_parameters = affine_gradients(
            unless(1, x),
            target,
            parameters,
            unless(1, grad * (1 - w)),
            (needed[0], *needed[2:]),
            None if select else value,
        )
        if by_target is not None:
            by_source = unless(0, source.backward(grad, unless(0, x)).to(wide))
            grad_x = torch.addcmul(by_target, by_source, w).to(x.dtype)
        return grad_x, grad_z, *of_parameters

    return _careful(compute, x, ends)
