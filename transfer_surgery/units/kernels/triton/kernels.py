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

from transfer_surgery.units.kernels.triton.parts import (
    affine,
    gate,
    next_tile,
    parameter,
    place,
    program,
    unless,
)


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
    first_gate, _row, start, stop = program(tiles_per_run, tiles_per_program, gates, BLOCK_GATES)
    index = first_gate + tl.arange(0, BLOCK_GATES)
    inside = index < gates
    PER_EXAMPLE: tl.constexpr = GATES_PER_EXAMPLE or NOISE_PER_EXAMPLE
    if not PER_EXAMPLE:
        z, _slope, ones, zeros = gate(
            gates_ptr, noise_ptr, index, index, inside, TEMPERATURE, XI, ZETA
        )
    a, w = parameter(a_ptr, index, inside, 1.0), parameter(w_ptr, index, inside, 1.0)
    c, b = parameter(c_ptr, index, inside, 0.0), parameter(b_ptr, index, inside, 0.0)
    blocks = tl.cdiv(count, BLOCK_COUNT)
    outer, first = start // blocks, (start % blocks) * BLOCK_COUNT
    for _tile in range(start, stop):
        base, offsets, mask = place(
            outer, first, first_gate, gates, count, GATES_ADJACENT, BLOCK_GATES, BLOCK_COUNT
        )
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if PER_EXAMPLE:
            own = (outer // outer_per_example) * gates + index
            z, _slope, ones, zeros = gate(
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
            f = TARGET(affine(x, w, c, w_ptr, c_ptr), TARGET_NUMBERS)[0]
            y = affine(f, a, b, a_ptr, b_ptr)
        else:
            s = SOURCE(unless(z, 0, x), SOURCE_NUMBERS)[0]
            f = TARGET(affine(unless(z, 1, x), w, c, w_ptr, c_ptr), TARGET_NUMBERS)[0]
            y = z * s + (1 - z) * affine(f, a, b, a_ptr, b_ptr)
        tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        outer, first = next_tile(outer, first, count, BLOCK_COUNT)


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
    first_gate, row, start, stop = program(tiles_per_run, tiles_per_program, gates, BLOCK_GATES)
    index = first_gate + tl.arange(0, BLOCK_GATES)
    inside = index < gates
    PER_EXAMPLE: tl.constexpr = GATES_PER_EXAMPLE or NOISE_PER_EXAMPLE
    if not PER_EXAMPLE:
        z, slope, ones, zeros = gate(
            gates_ptr, noise_ptr, index, index, inside, TEMPERATURE, XI, ZETA
        )
    a, w = parameter(a_ptr, index, inside, 1.0), parameter(w_ptr, index, inside, 1.0)
    c, b = parameter(c_ptr, index, inside, 0.0), parameter(b_ptr, index, inside, 0.0)
    sum_z = tl.zeros((BLOCK_GATES, BLOCK_COUNT), tl.float32)
    sum_a, sum_w, sum_c, sum_b = sum_z, sum_z, sum_z, sum_z
    blocks = tl.cdiv(count, BLOCK_COUNT)
    outer, first = start // blocks, (start % blocks) * BLOCK_COUNT
    for _tile in range(start, stop):
        base, offsets, mask = place(
            outer, first, first_gate, gates, count, GATES_ADJACENT, BLOCK_GATES, BLOCK_COUNT
        )
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if PER_EXAMPLE:
            own = (outer // outer_per_example) * gates + index
            z, slope, ones, zeros = gate(
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
            f, of_f = TARGET(affine(x, w, c, w_ptr, c_ptr), TARGET_NUMBERS)
            of_f *= grad
            sum_a += grad * f
            sum_w += of_f * x
            sum_c += of_f
            sum_b += grad
            grad_x = of_f * (a * w)
        else:
            x_t = unless(z, 1, x)
            s, of_s = SOURCE(unless(z, 0, x), SOURCE_NUMBERS)
            f, of_f = TARGET(affine(x_t, w, c, w_ptr, c_ptr), TARGET_NUMBERS)
            difference = grad * (s - affine(f, a, b, a_ptr, b_ptr))
            if PER_EXAMPLE:
                difference = tl.where(slope == 0, 0.0, slope * difference)
            sum_z += difference
            to_t = unless(z, 1, (1 - z) * grad)
            of_f *= to_t
            sum_a += to_t * f
            sum_w += of_f * x_t
            sum_c += of_f
            sum_b += to_t
            grad_x = unless(z, 0, z * grad) * of_s + of_f * (a * w)
        tl.store(grad_x_ptr + base + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        outer, first = next_tile(outer, first, count, BLOCK_COUNT)
    if sums_ptr is not None:
        rows = tl.num_programs(0) // tl.cdiv(gates, BLOCK_GATES)
        stride = rows.to(tl.int64) * gates
        sums = sums_ptr + row.to(tl.int64) * gates + index
        if not PER_EXAMPLE:
            sum_z = tl.where(slope == 0, 0.0, slope * sum_z)
        a = tl.sum(a, axis=1)  # of one column: without that axis
        tl.store(sums, tl.sum(sum_z, axis=1), mask=inside)
        if a_ptr is not None:
            sums += stride
            tl.store(sums, tl.sum(sum_a, axis=1), mask=inside)
        if w_ptr is not None:
            sums += stride
            tl.store(sums, a * tl.sum(sum_w, axis=1), mask=inside)
        if c_ptr is not None:
            sums += stride
            tl.store(sums, a * tl.sum(sum_c, axis=1), mask=inside)
        if b_ptr is not None:
            sums += stride
            tl.store(sums, tl.sum(sum_b, axis=1), mask=inside)
