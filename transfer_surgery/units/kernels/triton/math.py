"""Float32 arithmetic for Triton kernels that `tl` lacks, or has in a form too long or imprecise."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton compiles the text of a kernel: it reads no types and has none for its decorator.)

from __future__ import annotations

import triton
import triton.language as tl

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
