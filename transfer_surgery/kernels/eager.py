"""Eq. 1 in plain torch: ``z * source(x) + (1 - z) * target(x)``, selecting where ``z`` is 0 or 1.

Where a gate is exactly 1 or 0 the other branch contributes nothing, forward and backward: its
values are replaced, not multiplied by zero (``0 * inf`` is nan).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation
from transfer_surgery.kernels.affine import Affine, affine, affine_gradients, affine_value

__all__ = ["gated", "gated_plain"]


def gated(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    straight_through: bool = False,
    operands: tuple[Tensor, ...] = (),
    parameters: Affine | None = None,
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

    Returns:
        A tensor of the shape of ``x`` and the dtype of ``source(x)``.

    Example:
        >>> from transfer_surgery.activations import get_activation
        >>> x = torch.tensor([-1.0, -1.0, -1.0])
        >>> gated(
        ...     x, torch.tensor([1.0, 0.5, 0.0]), get_activation("relu"), get_activation("square")
        ... )
        tensor([0.0000, 0.5000, 1.0000])
    """
    if _is_traced():  # plain code: inductor fuses it with its neighbours, TorchScript can save it
        return gated_plain(x, z, source, target, straight_through, operands, parameters)
    if type(x) in (Tensor, torch.nn.Parameter) and may_look(z):
        exact = not z.requires_grad or not straight_through
        if exact and bool((z == 1).all()):
            return source(_with_zero_gradient(x, z, *(parameters or ())), *operands)
        if exact and not operands and bool((z == 0).all()):  # those keep their gradient, which is 0
            return _target(_with_zero_gradient(x, z), target, parameters)
    if operands:
        return gated_plain(x, z, source, target, straight_through, operands, parameters)
    if parameters:
        matched: Tensor = _GatedAffine.apply(x, z, source, target, *parameters)
        return matched
    result: Tensor = _Gated.apply(x, z, source, target)
    return result


def _target(x: Tensor, target: Activation, parameters: Affine | None) -> Tensor:
    return target(x) if parameters is None else affine(x, target, parameters)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def may_look(gates: Tensor) -> bool:
    """Whether the gates' values may steer Python: on CPU, outside traces and transforms."""
    if _is_traced():
        return False
    plain = type(gates) in (Tensor, torch.nn.Parameter) and gates.device.type == "cpu"
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(gates)


def _with_zero_gradient(x: Tensor, *others: Tensor) -> Tensor:
    """``x``, through which others get the gradient 0 (not None: all parameters take part).

    Done to the input, since the result is a view, and networks change activations in place.
    """
    if not (torch.is_grad_enabled() and any(other.requires_grad for other in others)):
        return x
    result: Tensor = _ZeroGradient.apply(x, *others)
    return result


def _mix(s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    w = z.to(s.dtype)
    return torch.where(
        w == 1, s, torch.where(w == 0, t.to(s.dtype), w * s + (1 - w) * t.to(s.dtype))
    )


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
    y = _mix(s, t, z)
    if not straight_through:
        return y
    # Selecting gives exact gates no gradient: add theirs with the value 0.
    difference = (source(x, *operands) - _target(x, target, parameters)).detach()
    exact = ((w == 0) | (w == 1)) & difference.isfinite()
    return y + (z - z.detach()).to(y.dtype) * torch.where(exact, difference, 0.0)


class _ZeroGradient(torch.autograd.Function):
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


class _Gated(torch.autograd.Function):
    """Saves the input and the gates only; source and target are evaluated again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, z: Tensor, source: Activation, target: Activation) -> Tensor:
        return _mix(source(x), target(x), z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, z, ctx.source, ctx.target = inputs
        ctx.save_for_backward(x, z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, z = ctx.saved_tensors
        source, target = ctx.source, ctx.target
        grad_x = grad_z = None
        if ctx.needs_input_grad[0]:
            grad_x = _mix(source.backward(grad, x), target.backward(grad, x), z).to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = grad * (source(x) - target(x))
            wide = torch.promote_types(product.dtype, torch.float32)
            grad_z = product.to(wide).sum_to_size(z.shape)
        return grad_x, grad_z, None, None


class _GatedAffine(torch.autograd.Function):
    """The same for a target ``a * f(w*x + c) + b``, whose parameters get gradients too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, z: Tensor, source: Activation, target: Activation, *parameters: Tensor | None
    ) -> Tensor:
        return _mix(source(x), affine_value(x, target, *parameters), z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, z, ctx.source, ctx.target, *parameters = inputs
        ctx.save_for_backward(x, z, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, z, *parameters = ctx.saved_tensors
        source, target = ctx.source, ctx.target
        # Where a branch contributes nothing it sees the input 0 and the gradient 0.
        grad_x, *of_parameters = affine_gradients(
            torch.where(z == 1, 0.0, x),
            target,
            parameters,
            torch.where(z == 1, 0.0, (1 - z) * grad),
            (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]),
        )
        grad_z = None
        if grad_x is not None:
            of_source = source.backward(grad, torch.where(z == 0, 0.0, x))
            grad_x = (torch.where(z == 0, 0.0, z * of_source) + grad_x).to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = grad * (source(x) - affine_value(x, target, *parameters))
            wide = torch.promote_types(product.dtype, torch.float32)
            grad_z = product.to(wide).sum_to_size(z.shape)
        return grad_x, grad_z, None, None, *of_parameters
