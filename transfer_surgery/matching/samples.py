"""What is kept of each call of a site or layer: a bounded sample of its values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.fitting.sample import Positions, ends_of_groups, sampled_groups
from transfer_surgery.matching.ranks import over_ranks
from transfer_surgery.matching.refit.layer_refit import LayerFit
from transfer_surgery.matching.refit.sum_map import SumMap
from transfer_surgery.matching.two_networks.calls import Call
from transfer_surgery.matching.two_networks.side_by_side import SideBySide
from transfer_surgery.matching.two_networks.site_gradients import site_calls
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation

VALUES = 2**13
"""Values that a gate's target is fitted to at most, in all batches and ranks together.

With twice as many, held-out errors of the ResNet-20 were the same.
"""

_ELEMENTS = 2**26  # of all gates of what is held at a time: 256 MB in float32
_LEAST = 256  # values of a gate, however many gates there are

_FLOOR = 0.01  # least weight of an error with weights="gradient", as a share of the mean weight


class Pair(NamedTuple):
    """Samples of one call: what the module gets now, and what it gave in the original network.

    Both are ``(groups, values)`` for a site, and as `LayerFit.add` takes them for a layer. `ends`
    are the lowest and the highest of all that a site gets, ``(groups, 2)``.
    """

    now: Tensor
    wanted: Tensor
    weights: Tensor | None = None
    ends: Tensor | None = None


class Samples:
    """Draws the same elements of what a module gets in one network and gives in the other.

    Args:
        networks: both networks.
        calls: how often each module is called on a batch.
        fits: the fits of the layers among them.
    """

    def __init__(
        self,
        networks: TwoNetworks,
        calls: Mapping[nn.Module, int],
        fits: Mapping[nn.Module, LayerFit],
    ) -> None:
        self._networks, self._calls, self._fits = networks, calls, fits
        self._seeds = {module: 1000 * index for index, module in enumerate(calls)}
        self._sizes = [_size(batch) for batch in networks.batches]
        self._total = int(over_ranks([torch.tensor(sum(self._sizes))])[0])
        self._shapes: dict[Any, Any] = {}
        self._weights: dict[Any, Tensor] = {}
        self._sites_held = 1
        self._sums: dict[Any, SumMap | None] = {}
        self.routed: set[nn.Module] = set()
        """Modules that get other inputs in the two networks, as experts get other tokens."""

    @property
    def modules(self) -> list[nn.Module]:
        """The modules in the order of their calls."""
        return list(self._calls)

    def weigh(self, logits: bool) -> None:
        """Sample the squared gradients of the original network's outputs at each site's output.

        Args:
            logits: whether the outputs are logits of classes.
        """
        units = [unit for unit in self._calls if isinstance(unit, GatedActivation)]
        self._sites_held = max(len(units), 1)  # one forward pass gives the weights of all
        for index, batch in enumerate(self._networks.batches):
            found = site_calls(self._networks, units, batch, index, logits)
            for unit, calls in found.items():
                for number, call in enumerate(calls):
                    key = Call(unit, index, number, [])
                    self._weights[key[:3]] = self._groups(key, _with_floor(call.squared_gradient))

    def behind(self, call: Call) -> Tensor:
        """Of an output of the original network."""
        output, *given = call.values
        self._shapes[call[:3]] = (given[0].shape, output.shape)
        if isinstance(call.module, GatedActivation):
            return self._groups(call, output)
        layer, positions = self._fits[call.module].map, self._positions(call, output.shape)
        return layer.outputs(output, positions) + self._of_sum(call, output.shape, positions)

    def before(self, call: Call) -> tuple[Any, ...]:
        """Of an input of the other network.

        For a site also of its source's output where that has operands, and ends.
        """
        x, *operands = call.values
        given, result = self._shapes.get(call[:3], (None, None))
        if given != x.shape:
            self.routed.add(call.module)
        if isinstance(call.module, GatedActivation):
            used = operands[: len(call.module.source.operands)]
            own = self._groups(call, call.module.source(x, *used)) if used else None
            return self._groups(call, x), own, ends_of_groups(x, call.module.granularity)
        if given != x.shape:
            return (x.new_zeros(0),)
        positions = self._positions(call, result)
        rows = self._fits[call.module].map.rows(x, result, positions)
        return rows, self._of_sum(call, result, positions)

    def _of_sum(self, call: Call, shape: Any, positions: Positions) -> Tensor:
        """What is added to an output of a layer, counted as outputs; 0 where that is not known."""
        none = torch.zeros(())
        if call.sum is None:
            return none
        key = call.module, shape
        if key not in self._sums:
            try:
                self._sums[key] = SumMap(self._fits[call.module].map, call.sum.chain)
            except ValueError:
                self._sums[key] = None
        found = self._sums[key]
        return none if found is None else found.in_outputs(call.sum.other, positions)

    def layer_pairs(self, layer: nn.Module, both: SideBySide) -> Iterator[Pair]:
        """Let both networks come to a layer, and take the samples of its calls.

        Where its output is added to something, what is wanted is the sum of the original network,
        less what the output is added to now. They are of no use where the layer is in `routed` at
        the end.
        """
        for now, wanted, _ in self._pairs(layer, both):
            if wanted is not None and layer not in self.routed:
                rows, in_sum = now
                yield Pair(rows, wanted - in_sum)
        self._sums = {key: found for key, found in self._sums.items() if key[0] is not layer}

    def site_pairs(self, unit: GatedActivation, both: SideBySide) -> list[Pair]:
        """The same for a site. Where it is in `routed`, wanted is what its source makes of x."""
        found = list(self._pairs(unit, both))
        if unit in self.routed:
            return [
                Pair(x, unit.source(x) if own is None else own, None, ends)
                for (x, own, ends), _, _ in found
            ]
        return [
            Pair(x, wanted, self._weights.get((unit, *key)), ends)
            for (x, _, ends), wanted, key in found
            if wanted is not None
        ]

    def _pairs(self, module: nn.Module, both: SideBySide) -> Iterator[Any]:
        for batch, (before, behind) in enumerate(both.upto(module)):
            if len(before) != len(behind):
                self.routed.add(module)
            for number, now in enumerate(before):
                wanted = behind[number] if number < len(behind) else None
                yield now, wanted, (batch, number)

    def _count(self, call: Call, limit: int) -> int:
        """How many values of a call are drawn, out of those of all calls, batches and ranks."""
        share = limit * self._sizes[call.batch] // self._total
        return max(share // self._calls[call.module], 1)

    def _seed(self, call: Call) -> int:
        return self._seeds[call.module] + 7919 * call.batch + 104729 * call.number

    def _groups(self, call: Call, x: Tensor) -> Tensor:
        unit = call.module
        assert isinstance(unit, GatedActivation)
        held = self._sites_held * math.prod(unit.gate.shape)
        limit = min(VALUES, max(_ELEMENTS // held, _LEAST))
        return sampled_groups(x, unit.granularity, self._count(call, limit), self._seed(call))

    def _positions(self, call: Call, shape: Any) -> Any:
        fit = self._fits[call.module]
        return fit.map.positions(shape, self._count(call, fit.limit), self._seed(call))


def _size(batch: Any) -> int:
    """How many values the tensors of a batch have: so much a batch counts for."""
    sizes: list[int] = []
    map_tensors(lambda x: sizes.append(x.numel()), batch)
    return sum(sizes)


def _with_floor(weights: Tensor) -> Tensor:
    """Weights with the mean 1, none of which is next to nothing."""
    mean = weights.mean()
    if not bool(mean > 0):
        return torch.ones_like(weights)
    return (weights / mean + _FLOOR) / (1 + _FLOOR)
