"""What is looked at where a forward pass of one of two networks waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from transfer_surgery.matching.two_networks.block_sums import Chain


class Sum(NamedTuple):
    """The sum that the output of a layer goes into, before it is made.

    Attributes:
        chain: what became of the output until there.
        other: the other summand.
    """

    chain: Chain
    other: Tensor


class Call(NamedTuple):
    """One call of a module in one of the networks.

    Attributes:
        module: what was called.
        batch: the number of the batch.
        number: of the call among those of this module on this batch.
        values: the arguments, in the original network behind the output.
        sum: where the call is of a layer that is fitted to a sum.
    """

    module: nn.Module
    batch: int
    number: int
    values: list[Any]
    sum: Sum | None = None


Look = Callable[[Call], Any]
"""What is kept of a call; its tensors may be overwritten afterwards."""
