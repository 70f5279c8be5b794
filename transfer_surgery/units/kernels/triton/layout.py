"""How the Triton kernels walk over a tensor: its memory as ``[outer, gates, count]``.

``count`` elements share a gate; either they or the gates are neighbours in memory:

=================================  =====  ========  ==========  =========
memory                             outer  gates     count       adjacent
=================================  =====  ========  ==========  =========
one gate per layer                 1      1         all         elements
channels first, ``(B, C, H, W)``   B      C         H*W         elements
channels last; ``(B, N, C)``       1      C         B*H*W; B*N  gates
one gate per neuron                1      features  B           gates
=================================  =====  ========  ==========  =========

With noise per example, ``outer`` is B everywhere and ``count`` that of one example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INT32 = 2**31 - 2**11  # a place one tile behind the end is still a number of 32 bits


@dataclass(frozen=True)
class Layout:
    """Extents of the walk; see the module."""

    outer: int
    gates: int
    count: int
    gates_adjacent: bool
    outer_per_example: int = 1
    """Steps of the outer index in one example; more than 1 for channels in the middle."""

    @property
    def aligned(self) -> int:
        """A power of two, at most 16, that divides the rows: vector loads rely on it."""
        return math.gcd(self.gates if self.gates_adjacent else self.count, 16)


def layout_of(
    x: Tensor, granularity: str, channel_axis: int, per_example: bool = False
) -> Layout | None:
    """The layout of a tensor, or None where its memory is not dense or the gates lie across it."""
    shape, elements = tuple(x.shape), x.numel()
    order = memory_order(x)
    if not shape or order is None:
        return None
    batch = shape[0] if per_example or elements >= _INT32 else 1
    if granularity == "layer":
        layout = Layout(batch, 1, elements // max(batch, 1), False)
    elif granularity == "neuron":
        layout = Layout(batch, math.prod(shape[1:]), shape[0] // max(batch, 1), True)
    else:
        axis, contiguous = channel_axis % len(shape), order == torch.contiguous_format
        if (axis != 1 and not contiguous) or (axis == 0 and per_example):
            return None
        inner = math.prod(shape[axis + 1 :]) if contiguous else 1
        if inner == 1:  # the channels are neighbours
            layout = Layout(batch, shape[axis], elements // max(batch * shape[axis], 1), True)
        else:
            outer = math.prod(shape[:axis])
            steps = outer // max(shape[0], 1) if per_example else 1
            layout = Layout(outer, shape[axis], inner, False, max(steps, 1))
    return layout if max(layout.outer, layout.gates, layout.count) < _INT32 else None


def memory_order(x: Tensor) -> torch.memory_format | None:
    """Contiguous, channels last, or None for neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last if last and x.is_contiguous(memory_format=last) else None


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: tiles of ``[block_gates, block_count]``, a few of them per program.

    A program stays with its gates, hence it adds up their gradients; ``runs`` separate sums are
    kept, of ``splits`` programs each.
    """

    block_gates: int
    block_count: int
    runs: int
    tiles_per_run: int
    tiles_per_program: int

    @property
    def splits(self) -> int:
        """Programs that share one run of one block of gates."""
        return -(-self.tiles_per_run // self.tiles_per_program)

    @property
    def rows(self) -> int:
        """Partial sums of one gate."""
        return self.runs * self.splits


def tiles_of(layout: Layout, itemsize: int, per_run: bool = False, sums: int = 1) -> Tiles:
    """Choose the tiles.

    Args:
        layout: of the tensor.
        itemsize: bytes of an element.
        per_run: keep one sum for each outer index rather than one for all.
        sums: how many gradients are summed; of a tensor of many megabytes their partial sums take
            at most 1/64 of the memory, unless fewer than some hundred elements share a gate.
    """
    if layout.gates_adjacent:  # 64 channels are a line of memory, and few that can agree on a gate
        block_gates = min(64, _power_of_two(layout.gates))
        block_count = min(1024 // block_gates, _power_of_two(layout.count))
    elif layout.count > 256:  # one gate per program: it decides alone; the cut that wastes less
        padded = {size: -(-layout.count // size) * size for size in (1024, 512)}
        block_gates, block_count = 1, min(padded, key=lambda size: padded[size])
    else:
        block_count = _power_of_two(layout.count)
        block_gates = min(1024 // block_count, _power_of_two(layout.gates))
    blocks = -(-layout.count // block_count)
    runs, tiles_per_run = (layout.outer, blocks) if per_run else (1, layout.outer * blocks)
    # Few sums, and the gates' hundreds of instructions for many tiles; but four programs for each
    # of some 128 multiprocessors.
    all_tiles = -(-layout.gates // block_gates) * layout.outer * blocks
    tiles = max(32, -(-64 * 4 * sums // (itemsize * block_count)))
    return Tiles(
        block_gates,
        block_count,
        runs,
        tiles_per_run,
        tiles_per_program=max(1, min(tiles, all_tiles // 512)),
    )


def _power_of_two(number: int) -> int:
    """The next one from ``number`` on."""
    return 1 << max(number - 1, 0).bit_length()
