"""How good the outputs are after each site, on so few examples that time is linear in depth."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from transfer_surgery.matching.output_errors import OutputChange, output_tensors
from transfer_surgery.matching.two_networks.forward_state import ForwardState
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation

_PASSES = 0.5  # forward passes of all batches: so much time all checks take together


class OutputCheck:
    """Compares the outputs of both networks on examples of the first batch.

    Args:
        networks: both networks.
        state: what a forward pass changes in the model; each check begins and leaves it as it was.
        wanted: the output of the original network for the first batch.
        sites: number of sites after which the outputs are compared.
        logits: whether the outputs are logits of classes.

    Raises:
        TypeError: the output has no floating tensors.
    """

    def __init__(
        self, networks: TwoNetworks, state: ForwardState, wanted: Any, sites: int, logits: bool
    ) -> None:
        self._networks, self._state = networks, state
        self._batch, self._wanted = networks.batches[0], wanted
        count = example_count(self._batch)
        if count:
            fewer = max(int(_PASSES * count * len(networks.batches) / max(sites, 1)), 1)
            if fewer < count and (part := self._first(fewer)) is not None:
                self._batch, self._wanted = part
        output_tensors(self._wanted)
        self._logits = logits

    def _first(self, number: int) -> tuple[Any, Any] | None:
        """The first examples and the output for them, if they can be told from the others."""

        def cut(value: Any) -> Any:
            return value[:number] if isinstance(value, Tensor) else value

        batch = tree_map(cut, self._batch)
        try:
            output = self._run(batch)
        except Exception:  # a graph, say, whose nodes need each other
            return None
        whole = [x for x in tree_leaves(self._wanted) if isinstance(x, Tensor)]
        parts = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if len(whole) != len(parts):
            return None
        for all_of_it, part in zip(whole, parts, strict=True):
            if part.shape != (number, *all_of_it.shape[1:]):
                return None
            first = all_of_it[:number].to(part.dtype)
            if not torch.allclose(part, first, rtol=1e-2, atol=1e-3, equal_nan=True):
                return None
        return batch, output

    def compare(
        self, transferred: Collection[GatedActivation]
    ) -> tuple[dict[str, float] | None, float | None]:
        """How far the outputs are from the original ones, with these sites at their targets.

        Returns:
            The relative squared error of each output, or None where they cannot be compared, as
            numbers of boxes that differ; and the KL divergence, if the outputs are logits.
        """
        now = self._run(self._batch, transferred, False)
        change = OutputChange(self._logits)
        try:
            change.add(now, self._wanted)
        except TypeError:
            return None, None
        return change.values()[:2]

    def _run(self, batch: Any, *network: Any) -> Any:
        with self._state.changed_to(self._state.start):
            return self._networks.run(batch, *network)


def example_count(batch: Any) -> int:
    """The length that all tensors of a batch have in common; 0 where they have none."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        return 0
    lengths = {leaf.shape[0] for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else 0
