"""Eq. 1 in plain torch: ``z * source(x) + (1 - z) * target(x)``, selecting where ``z`` is 0 or 1.

Where a gate is exactly 1 or 0 the other branch contributes nothing, forward and backward: its
values are replaced, not multiplied by zero (``0 * inf`` is nan).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.units.kernels.affine import Affine, affine
from transfer_surgery.units.kernels.function import Function
from transfer_surgery.units.kernels.mixed import mix, mixed
from transfer_surgery.units.kernels.pieces import may_look


def gated(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    straight_through: bool = False,
    operands: tuple[Tensor, ...] = (),
    parameters: Affine | None = None,
    in_place: bool = False,
) -> Tensor:
    """The gated activation of Eq. 1.

    Args:
        x: input, any shape.
        z: gates in [0, 1], float32, of a shape that broadcasts to that of ``x``.
        source: activation where ``z`` is 1.
        target: activation where ``z`` is 0.
        straight_through: whether exact gates need a gradient too (Bernoulli gates).
        operands: further tensors that the source takes, such as a learned slope.
        parameters: ``(a, w, c, b)`` of the target ``a * target(w*x + c) + b``; None: as it is.
        in_place: nobody else reads ``x``: while all gates are 1 its memory may hold the result.

    Returns:
        A tensor of the shape of ``x`` and the dtype of ``source(x)``.

    Examples:
        >>> from transfer_surgery import get_activation
        >>> x = torch.tensor([-1.0, -1.0, -1.0])
        >>> gated(
        ...     x, torch.tensor([1.0, 0.5, 0.0]), get_activation("relu"), get_activation("square")
        ... )
        tensor([0.0000, 0.5000, 1.0000])
    """
    if _is_traced():  # plain code: inductor fuses it with its neighbours, TorchScript can save it
        return gated_plain(x, z, source, target, straight_through, operands, parameters)
    ends = True
    if type(x) in (Tensor, torch.nn.Parameter) and may_look(z) and z.numel():
        low, high = (end.item() for end in z.detach().aminmax())
        ends = low == 0 or high == 1
        exact = not (z.requires_grad and straight_through)
        if exact and low == 1:
            if in_place and source in _IN_PLACE and x.grad_fn is not None and not x._is_view():
                return _IN_PLACE[source](_zero_gradient_in_place(x, z, *(parameters or ())))
            return source(_with_zero_gradient(x, z, *(parameters or ())), *operands)
        if exact and high == 0 and not operands:  # those keep their gradient, which is 0
            return _target(_with_zero_gradient(x, z), target, parameters)
    if operands:
        return gated_plain(x, z, source, target, straight_through, operands, parameters)
    return mixed(x, z, source, target, parameters, ends)


def _target(x: Tensor, target: Activation, parameters: Affine | None) -> Tensor:
    return target(x) if parameters is None else affine(x, target, parameters)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _with_zero_gradient(x: Tensor, *others: Tensor) -> Tensor:
    """``x``, through which others get the gradient 0 (not None: all parameters take part).

    Done to the input, since the result is a view, and networks change activations in place.
    """
    if not (torch.is_grad_enabled() and any(other.requires_grad for other in others)):
        return x
    result: Tensor = _ZeroGradient.apply(x, *others)
    return result


def _zero_gradient_in_place(x: Tensor, *others: Tensor | None) -> Tensor:
    """The same, with a result that is no view: it can be overwritten."""
    others = tuple(other for other in others if other is not None and other.requires_grad)
    result: Tensor = _ZeroGradientInPlace.apply(x, *others) if others else x
    return result


def gated_plain(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    straight_through: bool = False,
    operands: tuple[Tensor, ...] = (),
    parameters: Affine | None = None,
) -> Tensor:
    """`gated` as plain differentiable tensor code; an unused branch sees the input 0."""
    w = z.to(x.dtype)
    s = source(torch.where(w == 0, 0.0, x), *operands)
    t = _target(torch.where(w == 1, 0.0, x), target, parameters)
    y = mix(s, t, z)
    if not straight_through:
        return y
    # Selecting gives exact gates no gradient: add theirs with the value 0.
    difference = (source(x, *operands) - _target(x, target, parameters)).detach()
    exact = ((w == 0) | (w == 1)) & difference.isfinite()
    return y + (z - z.detach()).to(y.dtype) * torch.where(exact, difference, 0.0)


class _ZeroGradient(Function):
    @staticmethod
    def forward(x: Tensor, *others: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.likes = [(other.shape, other.dtype) for other in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        zeros = (torch.zeros(s, dtype=d, device=grad.device) for s, d in ctx.likes)
        return grad, *zeros


class _ZeroGradientInPlace(_ZeroGradient):
    @staticmethod
    def forward(x: Tensor, *others: Tensor) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        _ZeroGradient.setup_context(ctx, inputs, output)


# Those whose gradient comes from the result: nothing else is kept for backward.
_IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    get_activation("relu"): torch.relu_,
    get_activation("relu6"): partial(torch.nn.functional.hardtanh_, min_val=0.0, max_val=6.0),
}
