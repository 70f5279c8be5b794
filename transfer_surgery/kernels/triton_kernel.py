"""The gated activation as two Triton kernels: one launch forward, one backward, gate maths inside.

A program keeps a block of gates and walks over tiles ``[gates, elements]`` of the input, as
`triton_layout` describes it; where all its gates are 1, or all are 0, it evaluates one branch only.
Backward evaluates source and target again from the input, and leaves partial sums of the gradients
of gates and parameters, one row per program: no atomics, so every call gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: N803, N806
# (Triton compiles the text of a kernel: it reads no types and has none for its decorator, and
# constants are in capitals, as everywhere in Triton.)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def _program(tiles_per_run, tiles_per_program, gates, BLOCK_GATES: tl.constexpr):
    """This program's gates, its row of partial sums, and its range of tiles."""
    blocks = tl.cdiv(gates, BLOCK_GATES)
    first_gate = (tl.program_id(0) % blocks) * BLOCK_GATES
    row = tl.program_id(0) // blocks
    splits = tl.cdiv(tiles_per_run, tiles_per_program)
    run = row // splits
    start = (row % splits) * tiles_per_program
    stop = tl.minimum(start + tiles_per_program, tiles_per_run)
    return first_gate, row, run * tiles_per_run + start, run * tiles_per_run + stop


@triton.jit
def _place(
    tile,
    first_gate,
    gates,
    count,
    GATES_ADJACENT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    """Outer index of a tile, its start in memory, its offsets from there, and what is inside."""
    blocks = tl.cdiv(count, BLOCK_COUNT)
    outer = tile // blocks
    first = (tile % blocks) * BLOCK_COUNT
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
    return outer, start, offsets, mask


@triton.jit
def _gate(
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
def _parameter(pointer, index, inside, default: tl.constexpr):
    if pointer is None:
        value = tl.full(index.shape, default, tl.float32)
    else:
        value = tl.load(pointer + index, mask=inside, other=default)
    return value[:, None]


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    gates_ptr,
    noise_ptr,
    a_ptr,
    w_ptr,
    c_ptr,
    b_ptr,
    gates,
    count,
    outer_per_example,
    tiles_per_run,
    tiles_per_program,
    ALIGNED: tl.constexpr,
    GATES_ADJACENT: tl.constexpr,
    GATES_PER_EXAMPLE: tl.constexpr,
    NOISE_PER_EXAMPLE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    XI: tl.constexpr,
    ZETA: tl.constexpr,
    SOURCE: tl.constexpr,
    SOURCE_NUMBERS: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_NUMBERS: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    """``y = z * source(x) + (1 - z) * (a * target(w*x + c) + b)``."""
    if GATES_ADJACENT:
        gates *= ALIGNED
    else:
        count *= ALIGNED
    first_gate, _row, start, stop = _program(tiles_per_run, tiles_per_program, gates, BLOCK_GATES)
    index = first_gate + tl.arange(0, BLOCK_GATES)
    inside = index < gates
    PER_EXAMPLE: tl.constexpr = GATES_PER_EXAMPLE or NOISE_PER_EXAMPLE
    if not PER_EXAMPLE:
        z, _slope, ones, zeros = _gate(
            gates_ptr, noise_ptr, index, index, inside, TEMPERATURE, XI, ZETA
        )
    a, w = _parameter(a_ptr, index, inside, 1.0), _parameter(w_ptr, index, inside, 1.0)
    c, b = _parameter(c_ptr, index, inside, 0.0), _parameter(b_ptr, index, inside, 0.0)
    for tile in range(start, stop):
        outer, base, offsets, mask = _place(
            tile, first_gate, gates, count, GATES_ADJACENT, BLOCK_GATES, BLOCK_COUNT
        )
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if PER_EXAMPLE:
            own = (outer // outer_per_example) * gates + index
            z, _slope, ones, zeros = _gate(
                gates_ptr,
                noise_ptr,
                own if GATES_PER_EXAMPLE else index,
                own if NOISE_PER_EXAMPLE else index,
                inside,
                TEMPERATURE,
                XI,
                ZETA,
            )
        if ones:
            y = SOURCE(x, SOURCE_NUMBERS)[0]
        elif zeros:
            f = TARGET(w * x + c, TARGET_NUMBERS)[0]
            y = a * f + b
        else:
            # A branch that contributes nothing sees the input 0: its value is finite.
            s = SOURCE(tl.where(z == 0, 0.0, x), SOURCE_NUMBERS)[0]
            f = TARGET(w * tl.where(z == 1, 0.0, x) + c, TARGET_NUMBERS)[0]
            y = z * s + (1 - z) * (a * f + b)
        tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x_ptr,
    grad_ptr,
    grad_x_ptr,
    sums_ptr,
    gates_ptr,
    noise_ptr,
    a_ptr,
    w_ptr,
    c_ptr,
    b_ptr,
    gates,
    count,
    outer_per_example,
    tiles_per_run,
    tiles_per_program,
    ALIGNED: tl.constexpr,
    GATES_ADJACENT: tl.constexpr,
    GATES_PER_EXAMPLE: tl.constexpr,
    NOISE_PER_EXAMPLE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    XI: tl.constexpr,
    ZETA: tl.constexpr,
    SOURCE: tl.constexpr,
    SOURCE_NUMBERS: tl.constexpr,
    TARGET: tl.constexpr,
    TARGET_NUMBERS: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    """The gradient of ``x``, and partial sums ``[1 to 5, programs, gates]``: gate, a, w, c, b."""
    if GATES_ADJACENT:
        gates *= ALIGNED
    else:
        count *= ALIGNED
    first_gate, row, start, stop = _program(tiles_per_run, tiles_per_program, gates, BLOCK_GATES)
    index = first_gate + tl.arange(0, BLOCK_GATES)
    inside = index < gates
    PER_EXAMPLE: tl.constexpr = GATES_PER_EXAMPLE or NOISE_PER_EXAMPLE
    if not PER_EXAMPLE:
        z, slope, ones, zeros = _gate(
            gates_ptr, noise_ptr, index, index, inside, TEMPERATURE, XI, ZETA
        )
    a, w = _parameter(a_ptr, index, inside, 1.0), _parameter(w_ptr, index, inside, 1.0)
    c, b = _parameter(c_ptr, index, inside, 0.0), _parameter(b_ptr, index, inside, 0.0)
    sum_z = tl.zeros((BLOCK_GATES, BLOCK_COUNT), tl.float32)
    sum_a, sum_w, sum_c, sum_b = sum_z, sum_z, sum_z, sum_z
    for tile in range(start, stop):
        outer, base, offsets, mask = _place(
            tile, first_gate, gates, count, GATES_ADJACENT, BLOCK_GATES, BLOCK_COUNT
        )
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if PER_EXAMPLE:
            own = (outer // outer_per_example) * gates + index
            z, slope, ones, zeros = _gate(
                gates_ptr,
                noise_ptr,
                own if GATES_PER_EXAMPLE else index,
                own if NOISE_PER_EXAMPLE else index,
                inside,
                TEMPERATURE,
                XI,
                ZETA,
            )
        if ones:
            of_s = SOURCE(x, SOURCE_NUMBERS)[1]
            grad_x = grad * of_s
        elif zeros:
            f, of_f = TARGET(w * x + c, TARGET_NUMBERS)
            sum_a += grad * f
            sum_w += grad * of_f * x
            sum_c += grad * of_f
            sum_b += grad
            grad_x = grad * of_f * (a * w)
        else:
            x_t = tl.where(z == 1, 0.0, x)
            s, of_s = SOURCE(tl.where(z == 0, 0.0, x), SOURCE_NUMBERS)
            f, of_f = TARGET(w * x_t + c, TARGET_NUMBERS)
            grad_s = tl.where(z == 0, 0.0, z * grad)
            grad_t = tl.where(z == 1, 0.0, (1 - z) * grad)
            sum_z += tl.where(slope == 0, 0.0, slope * grad * (s - (a * f + b)))
            sum_a += grad_t * f
            sum_w += grad_t * of_f * x_t
            sum_c += grad_t * of_f
            sum_b += grad_t
            grad_x = grad_s * of_s + grad_t * of_f * (a * w)
        tl.store(grad_x_ptr + base + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        rows = tl.num_programs(0) // tl.cdiv(gates, BLOCK_GATES)
        stride = rows.to(tl.int64) * gates
        place = sums_ptr + row.to(tl.int64) * gates + index
        a = tl.sum(a, axis=1)  # of one column: without that axis
        tl.store(place, tl.sum(sum_z, axis=1), mask=inside)
        if a_ptr is not None:
            place += stride
            tl.store(place, tl.sum(sum_a, axis=1), mask=inside)
        if w_ptr is not None:
            place += stride
            tl.store(place, a * tl.sum(sum_w, axis=1), mask=inside)
        if c_ptr is not None:
            place += stride
            tl.store(place, a * tl.sum(sum_c, axis=1), mask=inside)
        if b_ptr is not None:
            place += stride
            tl.store(place, tl.sum(sum_b, axis=1), mask=inside)
