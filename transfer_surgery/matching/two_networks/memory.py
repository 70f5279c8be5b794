"""How many forward passes may wait at a time in the memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_SHARE = 0.5  # of the free memory that waiting forward passes take by default
_THREADS = 4000  # of the system: each waiting forward pass has as many as torch uses


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now; on the CPU within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux: half of what is built in
        if not hasattr(os, "sysconf"):
            return 2**32
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(free, max(limit - int((group / "memory.current").read_text()), 0))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def batches_that_wait(number: int, held: int, device: torch.device, most: int | None) -> int:
    """How many batches can wait, each in a forward pass of two networks.

    Args:
        number: of batches.
        held: bytes that a forward pass of one batch holds.
        device: where it runs.
        most: bytes that all of them may hold; None: half of what is free.

    Examples:
        >>> batches_that_wait(8, held=100, device=torch.device("cpu"), most=1000)
        5
    """
    most = int(_SHARE * free_bytes(device)) if most is None else most
    threads = max(_THREADS // (2 * torch.get_num_threads()), 1)
    return min(number, threads, most // max(2 * held, 1))
