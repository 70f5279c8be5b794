"""Activations inside Triton kernels: value and derivative in float32, element by element.

Each function returns both; the compiler drops the one that a kernel does not use. What is not in
the table at the end runs the eager way.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton compiles the text of a kernel; it reads no types, and has none for its decorator.)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from transfer_surgery.activations import Activation
from transfer_surgery.units.kernels.triton.math import clamp, expm1, half_turn, log1p, sine_cosine

Numbers = tuple[float, ...]


@triton.jit
def relu(x, p: tl.constexpr):
    return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def threshold(x, p: tl.constexpr):
    return tl.where(x <= p[0], p[1], x), tl.where(x <= p[0], 0.0, 1.0)


@triton.jit
def hardtanh(x, p: tl.constexpr):
    return clamp(x, p[0], p[1]), tl.where((x <= p[0]) | (x >= p[1]), 0.0, 1.0)


@triton.jit
def leaky_relu(x, p: tl.constexpr):
    return tl.where(x > 0, x, x * p[0]), tl.where(x > 0, 1.0, p[0])


@triton.jit
def elu(x, p: tl.constexpr):
    """``p``: factors of the negative side, of the positive side, and of ``x`` in the exponent."""
    inner = tl.where(x > 0, 0.0, x * p[2])
    negative = x <= 0
    slope = p[0] * p[2] * tl.exp(inner)
    return tl.where(negative, p[0] * expm1(inner), x * p[1]), tl.where(negative, slope, p[1])


@triton.jit
def gelu(x, p: tl.constexpr):
    cdf = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit
def gelu_tanh(x, p: tl.constexpr):
    """``0.5 * (1 + tanh(v))`` is ``sigmoid(2 * v)``."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s, s + x * s * (1 - s) * (1.5957691216057308 + 0.21406844776 * x * x)


@triton.jit
def swish(x, p: tl.constexpr):
    s = tl.sigmoid(p[0] * x)
    return x * s, s * (1 + p[0] * x * (1 - s))


@triton.jit
def mish(x, p: tl.constexpr):
    """``tanh(softplus(x))`` is ``n / (n + 2)`` with ``n = e * (e + 2)``, and 1 from 20 on."""
    e = tl.exp(clamp(x, float("-inf"), 20.0))
    n = e * (e + 2)
    t = n / (n + 2)
    return x * t, t + x * tl.sigmoid(x) * (4 * (n + 1) / ((n + 2) * (n + 2)))


@triton.jit
def hardswish(x, p: tl.constexpr):
    slope = tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x * (1 / 3) + 0.5))
    return x * clamp(x + 3, 0.0, 6.0) * (1 / 6), slope


@triton.jit
def hardsigmoid(x, p: tl.constexpr):
    return clamp(x + 3, 0.0, 6.0) * (1 / 6), tl.where((x > -3) & (x < 3), 1 / 6, 0.0)


@triton.jit
def softplus(x, p: tl.constexpr):
    """``p``: beta and the value of ``beta * x`` from which it is the identity."""
    v = x * p[0]
    soft = (tl.where(v < 0, 0.0, v) + log1p(tl.exp(-tl.abs(v)))) * (1 / p[0])
    return tl.where(v > p[1], x, soft), tl.where(v > p[1], 1.0, tl.sigmoid(v))


@triton.jit
def tanh(x, p: tl.constexpr):
    """Nothing overflows: ``exp`` sees negative numbers; near 0, where it cancels, a polynomial."""
    u = x * x
    q = (-0.005905831232666969 * u + 0.020805351436138153) * u - 0.05378667265176773
    near = x + x * u * ((q * u + 0.13331958651542664) * u - 0.33333298563957214)
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    value = tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))
    return value, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def sigmoid(x, p: tl.constexpr):
    s = tl.sigmoid(x)
    return s, s * (1 - s)


@triton.jit
def resin(x, p: tl.constexpr):
    sine, cosine = half_turn(clamp(x, -1.5707963267948966, 1.5707963267948966))
    return sine, tl.where(tl.abs(x) < 1.5707963267948966, cosine, 0.0)


@triton.jit
def sin(x, p: tl.constexpr):
    return sine_cosine(x)


@triton.jit
def cos(x, p: tl.constexpr):
    sine, cosine = sine_cosine(x)
    return cosine, -sine


@triton.jit
def snake(x, p: tl.constexpr):
    sine, cosine = sine_cosine(p[0] * x)
    return x + sine * sine * (1 / p[0]), 1 + 2 * sine * cosine


@triton.jit
def identity(x, p: tl.constexpr):
    return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def square(x, p: tl.constexpr):
    return x * x, 2 * x


@triton.jit
def squared_relu(x, p: tl.constexpr):
    r = tl.where(x <= 0, 0.0, x)
    return r * r, 2 * r


@triton.jit
def polynomial(x, p: tl.constexpr):
    return (p[0] * x + p[1]) * x + p[2], 2 * p[0] * x + p[1]


class TritonActivation(NamedTuple):
    """A device function ``f(x, numbers) -> (value, derivative)`` and its numbers."""

    function: Any
    numbers: Numbers


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

_FUNCTIONS: dict[str, tuple[Any, Callable[..., Numbers]]] = {
    "relu": (relu, lambda: ()),
    "relu6": (hardtanh, lambda: (0.0, 6.0)),
    "leaky_relu": (leaky_relu, lambda negative_slope: (negative_slope,)),
    "elu": (elu, lambda alpha: (alpha, 1.0, 1.0)),
    "selu": (elu, lambda: (_SELU_ALPHA * _SELU_SCALE, _SELU_SCALE, 1.0)),
    "celu": (elu, lambda alpha: (alpha, 1.0, 1 / alpha)),
    "silu": (swish, lambda: (1.0,)),
    "swish": (swish, lambda beta: (beta,)),
    "quick_gelu": (swish, lambda: (1.702,)),
    "mish": (mish, lambda: ()),
    "hardswish": (hardswish, lambda: ()),
    "hardsigmoid": (hardsigmoid, lambda: ()),
    "hardtanh": (hardtanh, lambda min_val, max_val: (min_val, max_val)),
    "threshold": (threshold, lambda threshold, value: (threshold, value)),
    "softplus": (softplus, lambda beta, threshold: (beta, threshold)),
    "tanh": (tanh, lambda: ()),
    "sigmoid": (sigmoid, lambda: ()),
    "resin": (resin, lambda: ()),
    "sin": (sin, lambda: ()),
    "cos": (cos, lambda: ()),
    "snake": (snake, lambda a: (a,)),
    "identity": (identity, lambda: ()),
    "square": (square, lambda: ()),
    "squared_relu": (squared_relu, lambda: ()),
    "polynomial": (polynomial, lambda a, b, c: (a, b, c)),
}


def in_triton(activation: Activation) -> TritonActivation | None:
    """The device function of an activation and its numbers; None where there is none."""
    parameters = dict(activation.parameters)
    if activation.operands or parameters.pop("written", None):
        return None
    if activation.name == "gelu":
        exact = parameters["approximate"] == "none"
        return TritonActivation(gelu if exact else gelu_tanh, ())
    if activation.name not in _FUNCTIONS:
        return None
    function, numbers = _FUNCTIONS[activation.name]
    values = tuple(float(number) for number in numbers(**parameters))
    return TritonActivation(function, values) if all(map(math.isfinite, values)) else None
