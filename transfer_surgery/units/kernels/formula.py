"""Eq. 1 as plain tensor code: ``z * source(x) + (1 - z) * target(x)``, selecting at the ends.

Everything else in this folder evaluates these lines: at once, again in the backward pass, or
compiled. Being plain code they have derivatives of every order and mode, and trace and export.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, horner

Numbers = tuple[Tensor, ...]
"""``(a, w, c, b)`` of a fitted target, of shapes that broadcast to the input; those of a polynomial
are followed by its coefficients ``(k1, k2, ...)``."""

# At 1 training would not see what inputs outside of the range do to the sites behind.
_BOUND = 2.0


def fitted_value(
    x: Tensor, f: Activation, numbers: Numbers | None, bounded: bool = False
) -> Tensor:
    """``a * f(w*x + c) + b``, with ``f(v) = k1*v + k2*v**2 + ...`` where there are coefficients.

    The arithmetic is done in the wider one of the dtypes of ``x`` and of the numbers: in bfloat16
    a sine would see its argument off by up to 0.03 beyond 8.

    Args:
        x: input, any shape.
        f: an activation without operands.
        numbers: ``(a, w, c, b, *k)``; None: the activation as it is.
        bounded: a fitted polynomial is constant where ``w*x + c`` is below -2 or above 2. The range
            of its fit is from -1 to 1.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Examples:
        >>> from transfer_surgery import get_activation
        >>> two, one, zero = torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.0)
        >>> fitted_value(torch.tensor([-3.0, 3.0]), get_activation("relu"), (two, one, zero, one))
        tensor([1., 7.])
    """
    if numbers is None:
        return f(x)
    a, w, c, b, *coefficients = numbers
    # Not torch.result_type, which torch.compile does not follow.
    inner = x.to(torch.promote_types(x.dtype, w.dtype))
    v = inner * w + c
    if coefficients and bounded:
        v = v.clamp(-_BOUND, _BOUND)
    y = horner(v, coefficients) if coefficients else f(v)
    return (y * a + b).to(x.dtype)


def gated_value(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    operands: tuple[Tensor, ...] = (),
    numbers: Numbers | None = None,
    bounded: bool = False,
    select: bool = True,
) -> Tensor:
    """The gated activation of Eq. 1.

    Args:
        x: input, any shape.
        z: gates in [0, 1], of a shape that broadcasts to that of ``x``.
        source: activation where ``z`` is 1.
        target: activation where ``z`` is 0.
        operands: further tensors that the source takes, such as a learned slope.
        numbers: those of a fitted target.
        bounded: as in `fitted_value`.
        select: where ``z`` is exactly 1 or 0, the other branch sees the input 0 and its result is
            left out (``0 * inf`` is nan), forward and backward. Without it the result is the same
            as long as both branches are finite.

    Returns:
        A tensor of the shape of ``x`` and the dtype of ``source(x)``.
    """
    if not select:
        return _blend(source(x, *operands), fitted_value(x, target, numbers, bounded), z)
    s = source(torch.where(z == 0, 0.0, x), *operands)
    t = fitted_value(torch.where(z == 1, 0.0, x), target, numbers, bounded).to(s.dtype)
    exact = (z == 0) | (z == 1)
    mixed = _blend(torch.where(exact, 0.0, s), torch.where(exact, 0.0, t), z)
    return torch.where(z == 1, s, torch.where(z == 0, t, mixed))


def straight_through_value(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    operands: tuple[Tensor, ...] = (),
    numbers: Numbers | None = None,
    bounded: bool = False,
) -> Tensor:
    """`gated_value` in which exact gates also get a gradient, as Bernoulli gates need."""
    y = gated_value(x, z, source, target, operands, numbers, bounded)
    # Selecting gives exact gates no gradient: add theirs with the value 0.
    difference = (source(x, *operands) - fitted_value(x, target, numbers, bounded)).detach()
    exact = ((z == 0) | (z == 1)) & difference.isfinite()
    return y + ((z - z.detach()) * torch.where(exact, difference, 0.0)).to(y.dtype)


def _blend(s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    # In float32 at least: the gradient of a gate is a sum over all elements that share it.
    wide = torch.promote_types(s.dtype, torch.float32)
    return torch.lerp(t.to(wide), s.to(wide), z.to(wide)).to(s.dtype)
