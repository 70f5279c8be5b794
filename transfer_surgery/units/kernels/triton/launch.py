"""From tensors to launches of the two Triton kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from transfer_surgery.activations import get_activation
from transfer_surgery.units.kernels.affine import Affine
from transfer_surgery.units.kernels.triton.functions import TritonActivation, in_triton
from transfer_surgery.units.kernels.triton.kernels import backward_kernel, forward_kernel
from transfer_surgery.units.kernels.triton.layout import (
    Layout,
    Tiles,
    layout_of,
    memory_order,
    tiles_of,
)

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set on import: the kernels then run on the CPU, in numpy."""


class Call(NamedTuple):
    """The operator's arguments after ``x``."""

    gates: Tensor
    noise: Tensor | None
    a: Tensor | None
    w: Tensor | None
    c: Tensor | None
    b: Tensor | None
    source: str
    target: str
    granularity: str
    channel_axis: int
    constants: Sequence[float] | None

    @property
    def parameters(self) -> Affine:
        """Those of a matched target."""
        return self.a, self.w, self.c, self.b


def gate_count(x: Tensor, granularity: str, channel_axis: int) -> int:
    """Gates of one example."""
    if granularity == "layer":
        return 1
    return x.shape[channel_axis] if granularity == "channel" else math.prod(x.shape[1:])


def dense(x: Tensor, call: Call) -> Tensor:
    """The tensor itself if the kernels can walk over it, which `supports` has found out."""
    known = layout_of(x, call.granularity, call.channel_axis) is not None
    return x if known else x.contiguous()


def launch_forward(x: Tensor, call: Call) -> Tensor:
    """The gated activation."""
    x = dense(x, call)
    y = torch.empty_like(x)
    if x.numel():
        _launch(forward_kernel, x, call, (y,), *_plan(x, call))
    return y


def launch_backward(grad: Tensor, with_sums: bool, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, and with sums those of `sums_shape`."""
    x = dense(x, call)
    grad_x = torch.empty_like(x)
    shape = sums_shape(x, call, with_sums)
    if not x.numel():
        return grad_x, call.gates.new_zeros(shape)
    if grad.stride() != x.stride() or grad.dtype != x.dtype:  # expanded, or of another format
        grad = torch.empty_like(x).copy_(grad)
    layout, tiles = _plan(x, call)
    if not with_sums:
        _launch(backward_kernel, x, call, (grad, grad_x, None), layout, tiles)
        return grad_x, call.gates.new_zeros(shape)
    rows, runs = shape[:2]
    partial = call.gates.new_empty(rows, runs, tiles.rows // runs, layout.gates)
    _launch(backward_kernel, x, call, (grad, grad_x, partial), layout, tiles)
    return grad_x, _in_order_of_axes(partial.sum(2), x, call)


def sums_shape(x: Tensor, call: Call, with_sums: bool) -> tuple[int, int, int]:
    """``[gate and each of a, w, c, b that is there, examples or 1, gates]``."""
    count = gate_count(x, call.granularity, call.channel_axis)
    own = call.gates.numel() > count
    rows = 1 + sum(p is not None for p in call.parameters) if with_sums else 0
    return rows, x.shape[0] if own else 1, count


def _plan(x: Tensor, call: Call) -> tuple[Layout, Tiles]:
    count = gate_count(x, call.granularity, call.channel_axis)
    own = call.gates.numel() > count
    own_noise = call.noise is not None and call.noise.numel() > count
    layout = layout_of(x, call.granularity, call.channel_axis, own or own_noise)
    assert layout is not None
    sums = 1 + sum(p is not None for p in call.parameters)
    return layout, tiles_of(layout, x.itemsize, own, sums)


def _in_order_of_memory(t: Tensor, x: Tensor, call: Call) -> Tensor:
    """Numbers per neuron lie as the features of ``x`` lie."""
    order = memory_order(x)
    if call.granularity != "neuron" or order is None or order == torch.contiguous_format:
        return t.contiguous()
    return t.reshape(-1, *x.shape[1:]).contiguous(memory_format=order)


def _in_order_of_axes(sums: Tensor, x: Tensor, call: Call) -> Tensor:
    """The inverse, for ``[sums, runs, gates]``."""
    if call.granularity != "neuron" or memory_order(x) == torch.contiguous_format:
        return sums
    return sums.view(-1, *x.shape[2:], x.shape[1]).movedim(-1, 1).reshape(sums.shape)


def warps(kernel: Any, tiles: Tiles) -> int:
    """As many elements per thread as registers allow, in loads of 16 bytes where there is one gate.

    The rest of a turn of the loop, some 40 instructions, is then shared by enough of them. Several
    gates per thread take registers for their numbers and sums.
    """
    per_thread = 4 if tiles.block_gates > 1 else 16 if kernel is forward_kernel else 8
    return max(1, tiles.block_gates * tiles.block_count // (32 * per_thread))


@functools.cache
def _function(activation: str) -> TritonActivation:
    found = in_triton(get_activation(activation))
    if found is None:
        raise ValueError(f"activation {activation} has no Triton form: use the eager kernel.")
    return found


def _launch(
    kernel: Any,
    x: Tensor,
    call: Call,
    others: tuple[Tensor | None, ...],
    layout: Layout,
    tiles: Tiles,
) -> None:
    aligned, adjacent = layout.aligned, layout.gates_adjacent
    source, target = _function(call.source), _function(call.target)
    temperature, xi, zeta = call.constants or (None, None, None)
    small = (call.gates, call.noise, *call.parameters)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current
        kernel[-(-layout.gates // tiles.block_gates) * tiles.rows,](
            x,
            *others,
            *(None if t is None else _in_order_of_memory(t, x, call) for t in small),
            layout.gates // aligned if adjacent else layout.gates,
            layout.count if adjacent else layout.count // aligned,
            layout.outer_per_example,
            tiles.tiles_per_run,
            tiles.tiles_per_program,
            ALIGNED=aligned,
            GATES_ADJACENT=adjacent,
            GATES_PER_EXAMPLE=call.gates.numel() > layout.gates,
            NOISE_PER_EXAMPLE=call.noise is not None and call.noise.numel() > layout.gates,
            TEMPERATURE=temperature,
            XI=xi,
            ZETA=zeta,
            SOURCE=source.function,
            SOURCE_NUMBERS=source.numbers,
            TARGET=target.function,
            TARGET_NUMBERS=target.numbers,
            BLOCK_GATES=tiles.block_gates,
            BLOCK_COUNT=tiles.block_count,
            num_warps=warps(kernel, tiles),
            enable_fp_fusion=True,
        )
