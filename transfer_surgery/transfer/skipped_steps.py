"""Steps that a fused optimizer skips on the device, where a GradScaler found an overflow."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class SkippedSteps:
    """Counts skipped steps without waiting for the device.

    Plain optimizers are not called for a skipped step. Fused ones are called with a scalar
    ``found_inf`` on the device and skip there. It is copied to the host in the background and read
    once it has arrived, so the count may be a few steps late.
    """

    def __init__(self) -> None:
        self.pending: deque[tuple[Tensor, torch.Event]] = deque()

    def add(self, found_inf: Tensor) -> None:
        """Take note of a step, which was skipped if this scalar is not 0."""
        arrived = torch.Event(found_inf.device)
        copy = found_inf.to("cpu", non_blocking=True)
        arrived.record()
        self.pending.append((copy, arrived))

    def take(self, wait: bool = False) -> int:
        """The number of skipped steps that became known since the last call.

        Args:
            wait: whether to wait for those that are still on their way.
        """
        number = 0
        while self.pending and (wait or self.pending[0][1].query()):
            copy, arrived = self.pending.popleft()
            arrived.synchronize()
            number += bool(copy)
        return number
