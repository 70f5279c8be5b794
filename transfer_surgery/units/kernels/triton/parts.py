"""Parts of the two Triton kernels: the walk over tiles, the gates of Eq. 15 and 16, affine maps."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803
# (Triton compiles the text of a kernel: it reads no types and has none for its decorator, and
# constants are in capitals, as everywhere in Triton.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program(tiles_per_run, tiles_per_program, gates, BLOCK_GATES: tl.constexpr):
    """This program's gates, its row of partial sums, and its range of tiles."""
    blocks = tl.cdiv(gates, BLOCK_GATES)
    first_gate = (tl.program_id(0) % blocks) * BLOCK_GATES
    row = tl.program_id(0) // blocks
    splits = tl.cdiv(tiles_per_run, tiles_per_program)
    start = (row % splits) * tiles_per_program
    stop = tl.minimum(start + tiles_per_program, tiles_per_run)
    first = (row // splits) * tiles_per_run
    return first_gate, row, first + start, first + stop


@triton.jit
def place(
    outer,
    first,
    first_gate,
    gates,
    count,
    GATES_ADJACENT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    """Start of a tile in memory, its offsets from there, and which of them are inside."""
    g, n = tl.arange(0, BLOCK_GATES)[:, None], tl.arange(0, BLOCK_COUNT)[None, :]
    mask = (first_gate + g < gates) & (first + n < count)
    # Only the start can pass 2**31: the offsets stay in cheap 32 bits.
    start = outer.to(tl.int64) * gates * count
    if GATES_ADJACENT:
        start += first.to(tl.int64) * gates + first_gate
        offsets = n * gates + g
    else:
        start += first_gate.to(tl.int64) * count + first
        offsets = g * count + n
    return start, offsets, mask


@triton.jit
def next_tile(outer, first, count, BLOCK_COUNT: tl.constexpr):
    """The tile behind: divisions would cost as much as a sine."""
    first += BLOCK_COUNT
    return tl.where(first < count, outer, outer + 1), tl.where(first < count, first, 0)


@triton.jit
def gate(
    gates_ptr,
    noise_ptr,
    index,
    noise_index,
    inside,
    TEMPERATURE: tl.constexpr,
    XI: tl.constexpr,
    ZETA: tl.constexpr,
):
    """``z`` and its slope ``dz / dlog_alpha``, 0 where z is exactly 0 or 1.

    Eq. 15 with noise, Eq. 16 without; where the temperature is None, z is what is loaded.
    """
    z = tl.load(gates_ptr + index, mask=inside, other=0.0)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if TEMPERATURE is not None:
        slope *= ZETA - XI
        if noise_ptr is not None:
            eps = tl.load(noise_ptr + noise_index, mask=inside, other=0.5)
            z = (z + tl.log(eps) - tl.log(1 - eps)) * (1 / TEMPERATURE)
            slope *= 1 / TEMPERATURE
        v = tl.sigmoid(z)
        slope *= v * (1 - v)
        z = tl.minimum(tl.maximum(v * (ZETA - XI) + XI, 0.0), 1.0)
    slope = tl.where((z == 0) | (z == 1), 0.0, slope)
    ones = tl.min(tl.where(inside, z, 1.0), axis=0) == 1
    zeros = tl.max(tl.where(inside, z, 0.0), axis=0) == 0
    return z[:, None], slope[:, None], ones, zeros


@triton.jit
def parameter(pointer, index, inside, default: tl.constexpr):
    """One of a, w, c, b; where it is not there, what it would be."""
    if pointer is None:
        value = tl.full(index.shape, default, tl.float32)
    else:
        value = tl.load(pointer + index, mask=inside, other=default)
    return value[:, None]


@triton.jit
def affine(x, factor, offset, factor_ptr, offset_ptr):
    """``factor * x + offset``; no arithmetic for what is not there."""
    if factor_ptr is not None:
        x *= factor
    if offset_ptr is not None:
        x += offset
    return x


@triton.jit
def unless(z, exact: tl.constexpr, x):
    """``x``, and 0 where z is exactly that: a branch that contributes nothing stays finite.

    A program with one gate has looked at it before.
    """
    if z.shape[0] > 1:
        x = tl.where(z == exact, 0.0, x)
    return x
