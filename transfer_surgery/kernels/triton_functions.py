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

__all__ = ["TritonActivation", "in_triton"]

Numbers = tuple[float, ...]

# Polynomials below are minimax fits, in float32 within one or two units in the last place.


@triton.jit
def clamp(x, low, high):
    """Keeps nan, as torch does; ``tl.minimum`` drops it."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def half_turn(r):
    """``sin(r)`` and ``cos(r)`` for ``|r| <= pi/2``; the cosine is off by at most 1e-7."""
    u = r * r
    p = ((2.608566546768998e-06 * u - 0.0001981096138479188) * u + 0.008333086036145687) * u
    sine = r + r * u * (p - 0.16666659712791443)
    q = (-2.607341684779385e-07 * u + 2.4761686290730722e-05) * u - 0.0013888400280848145
    return sine, 1 + u * ((q * u + 0.04166664183139801) * u - 0.5)


@triton.jit
def huge_angle(x):
    """The angle in [-pi, pi) that equals ``x`` beyond 2**14, by integers (Payne and Hanek).

    With ``x = m * 2**(e - 10)`` and 192 bits of ``2**-10 / pi``, the 64 bits from place ``e`` on
    times ``m``, modulo 2**64, are the half turns modulo 2.
    """
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
    e = ((bits >> 23) & 255) - 140
    shift = (e & 63).to(tl.uint64)
    high = tl.where(e < 64, 0xA2F9836E4E441, 0x529FC2757D1F534D).to(tl.uint64)
    low = tl.where(e < 64, 0x529FC2757D1F534D, 0xDC0DB6295993C439).to(tl.uint64)
    window = (high << shift) | ((low >> 1) >> (63 - shift))
    angle = (mantissa * window).to(tl.int64).to(tl.float32) * 3.4061215800865545e-19  # pi / 2**63
    return tl.where(x < 0, -angle, angle) + (x - x)  # nan for inf


@triton.jit
def sine_cosine(x):
    """``sin(x)`` and ``cos(x)``: precise for any ``x``, short for the usual ones.

    ``tl.sin`` becomes libdevice's ``__nv_sinf``: precise too, but each element has its own branch
    for huge arguments, 100 instructions long, and nothing is shared with ``tl.cos``: in bfloat16
    that would be the limit, not the memory. Here a tile asks once for huge arguments.
    """
    if tl.max(tl.abs(x)) > 16384.0:  # nan is not, and stays nan below
        x = tl.where(tl.abs(x) > 16384.0, huge_angle(x), x)
    # Cody and Waite: k = round(x / pi), its parity in the last bit; the first two of three parts of
    # pi have so few bits that their products with k are exact up to k = 2**13.
    shifted = x * 0.3183098861837907 + 12582912.0
    k = shifted - 12582912.0
    r = x - k * 3.140625 - k * 0.000967502593994140625 - k * 1.50995799097837643e-07
    sign = shifted.to(tl.int32, bitcast=True) << 31
    sine, cosine = half_turn(r)
    sine = (sine.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    cosine = (cosine.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return sine, cosine


@triton.jit
def log1p(u):
    """``log(1 + u)`` for ``0 <= u <= 1``, as ``2 * atanh(u / (2 + u))``."""
    s = u / (2 + u)
    q = s * s
    p = (0.1401224583387375 * q + 0.13999566435813904) * q + 0.20010849833488464
    return 2 * (s + s * q * (p * q + 0.3333320617675781))


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for ``x <= 0``, also where it is tiny."""
    p = (0.0011282293125987053 * x + 0.008196122013032436) * x + 0.0416332446038723
    near = x + x * x * ((p * x + 0.16666308045387268) * x + 0.49999988079071045)
    return tl.where(x > -0.5, near, tl.exp(x) - 1)


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
