"""Sums over the ranks of `torch.distributed`, and errors that all of them hear of.

Where no process group is initialised, nothing happens here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def number_of_ranks() -> int:
    """How many processes match the same model on different batches."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(tensors: Sequence[Tensor], how: str = "SUM") -> list[Tensor]:
    """The sums (or MIN, MAX) of tensors of the same shapes on all ranks; the same on each."""
    if number_of_ranks() == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).to(_device())
    dist.all_reduce(flat, getattr(dist.ReduceOp, how))
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t) for part, t in zip(parts, tensors, strict=True)]


def check_the_same(value: Any, what: str) -> None:
    """Raise a ValueError on every rank where something differs between ranks."""
    if number_of_ranks() == 1:
        return
    found: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(found, value)
    if any(other != found[0] for other in found):
        raise ValueError(f"the ranks differ in {what}: every rank needs the same converted model.")


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank where the work inside fails on one: the others would wait for ever."""
    if number_of_ranks() == 1:
        yield
        return
    try:
        yield
    except BaseException:
        on_any_rank(True)
        raise
    if on_any_rank(False):
        raise RuntimeError(
            "matching failed on another rank, which says why; this model is as it was."
        )


def on_any_rank(flag: bool) -> bool:
    """Whether a flag is set on one of the ranks at least."""
    if number_of_ranks() == 1:
        return flag
    total = torch.tensor([float(flag)], device=_device())
    dist.all_reduce(total)
    return bool(total)


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    on_cpu = "gloo" in dist.get_backend() or "mpi" in dist.get_backend()
    return torch.device("cpu" if on_cpu else f"cuda:{torch.cuda.current_device()}")
