"""Element-wise work on a CPU, piece by piece: what lies between input and result is in the cache.

An activation of several torch calls reads and writes memory once per call. On pieces of a batch
that fit into the cache only the first read and the last write go to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Results = Sequence[Tensor | None]

_ELEMENTS = 1 << 20  # per piece: 4 MiB of float32; smaller ones cost more Python than they save


def may_look(tensor: Tensor) -> bool:
    """Whether the tensor's values may steer Python: on CPU, outside traces and transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def by_pieces(function: Callable[..., Results], *inputs: Tensor | None) -> list[Tensor | None]:
    """``function(*inputs)``, called for pieces of the batch where that is worth while.

    Args:
        function: its n-th result belongs to the n-th input: it has its shape, maybe another dtype,
            and treats examples apart; for an input that all examples share it is a sum over them.
            It may have fewer results than inputs.
        inputs: the first has the batch in front. Others have it too, or are shared; or None.
    """
    x = inputs[0]
    assert x is not None
    rows = _rows(x)
    if rows is None:
        return list(function(*inputs))
    size = x.shape[0]
    cut = [t is not None and t.dim() == x.dim() and t.shape[0] == size for t in inputs]
    whole: dict[int, Tensor | None] = {}
    for start in range(0, size, rows):
        part = slice(start, start + rows)
        pieces = (t[part] if c and t is not None else t for t, c in zip(inputs, cut, strict=True))
        for i, result in enumerate(function(*pieces)):
            given, total = inputs[i], whole.get(i)
            if result is None or given is None:
                whole[i] = None
            elif not cut[i]:
                whole[i] = result if total is None else total + result
            else:
                if total is None:
                    whole[i] = total = torch.empty_like(given, dtype=result.dtype)
                total[part] = result
    return list(whole.values())


def _rows(x: Tensor) -> int | None:
    """Examples per piece; None: all at once."""
    if torch.is_grad_enabled() or not may_look(x) or x.dim() == 0 or x.numel() <= _ELEMENTS:
        return None
    rows = max(1, _ELEMENTS * x.shape[0] // x.numel())
    return rows if rows < x.shape[0] else None
