"""How good the outputs are after each site, on so few examples that time is linear in depth."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from transfer_surgery._running import kl_divergence, log_probabilities, logits_of
from transfer_surgery.matching.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation

_PASSES = 1  # forward pass of all batches: so much time the checks of all sites take together


class OutputCheck:
    """Compares the outputs of both networks on examples of the first batch.

    Args:
        networks: both networks.
        wanted: the output of the original network for the first batch.
        sites: number of sites after which the outputs are compared.
    """

    def __init__(self, networks: TwoNetworks, wanted: Any, sites: int) -> None:
        self._networks = networks
        self._batch, self._wanted = networks.batches[0], wanted
        count = _examples(self._batch)
        if count:
            fewer = max(_PASSES * count * len(networks.batches) // max(sites, 1), 1)
            if fewer < count and (part := self._first(fewer)) is not None:
                self._batch, self._wanted = part
        self._answers = log_probabilities(logits_of(self._wanted))

    def _first(self, number: int) -> tuple[Any, Any] | None:
        """The first examples and the output for them, if they can be told from the others."""

        def cut(value: Any) -> Any:
            return value[:number] if isinstance(value, Tensor) else value

        batch = tree_map(cut, self._batch)
        try:
            output = self._networks.run(batch)
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

    def divergence(self, transferred: Collection[GatedActivation]) -> float:
        """Mean KL divergence of the outputs, read as logits, from the original ones."""
        now = self._networks.log_probabilities(self._batch, transferred, False)
        return kl_divergence(now, self._answers).item()


def _examples(batch: Any) -> int:
    """The length that all tensors of a batch have in common; 0 where they have none."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        return 0
    lengths = {leaf.shape[0] for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else 0
