"""Where the outputs of a layer go in the sum that they are added to, and how much they count."""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_surgery.matching.fitting.sample import Positions
from transfer_surgery.matching.refit.linear_maps import LinearMap
from transfer_surgery.matching.two_networks.block_sums import Chain

_DIGITS = 2**12  # numbers below it stay whole numbers in float32, also with a factor
_TOLERANCE = 1e-2  # of what the steps make of real outputs
_LOOKED_AT = 2**12  # positions of an output by which the steps are judged
_FAINT = 1e-3  # a factor below this share of the others is as good as 0


class SumMap:
    """What the steps between a layer and its sum do: ``factor * y + shift``, maybe moved.

    The factor is one number per output channel, and positions may be in any order, as behind a
    change of the layout or where windows of an image are put together. That the steps do this is
    seen from what they make of chosen outputs and of real ones.

    Args:
        layer: reads the layer's outputs.
        chain: of a call of the layer.

    Raises:
        ValueError: the steps do something else.
    """

    def __init__(self, layer: LinearMap, chain: Chain) -> None:
        self._layer, y = layer, chain.start
        self._some = layer.positions(y.shape, _LOOKED_AT, seed=0)
        shift = chain.pass_on(torch.zeros_like(y))
        factors = chain.pass_on(torch.ones_like(y)) - shift
        if factors.shape != chain.summand.shape or factors.numel() != y.numel():
            raise ValueError("the steps change the number of values.")
        self._index: Tensor | None = None
        if not self._agrees(chain, shift, factors):
            self._index = _index(chain, shift, factors)
            if not self._agrees(chain, shift, factors):
                raise ValueError("the steps do not scale and move the outputs only.")
        scales = self._of(factors, self._some)
        self.factors = scales.mean(1, keepdim=True).double()  # (groups, 1, outputs)

    def _agrees(self, chain: Chain, shift: Tensor, factors: Tensor) -> bool:
        """Whether this is what the steps made of real outputs."""
        if self._index is None and chain.summand.shape != chain.start.shape:
            return False
        scales = self._of(factors, self._some)
        if bool((scales.amax(1) - scales.amin(1) > _TOLERANCE * scales.abs().amax(1)).any()):
            return False
        made = self._of(chain.summand, self._some) - self._of(shift, self._some)
        error = made - scales * self._layer.outputs(chain.start, self._some)
        return bool(error.square().mean() <= _TOLERANCE**2 * made.square().mean())

    def _of(self, summand: Tensor, positions: Positions) -> Tensor:
        if self._index is None:
            return self._layer.outputs(summand, positions)
        found = summand.reshape(-1)[self._layer.outputs(self._index, positions)]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def in_outputs(self, summand: Tensor, positions: Positions) -> Tensor:
        """What the layer would have to give for its summand to change by so much.

        Args:
            summand: a change of the summand, in the shape of the sum.
            positions: of the layer's output.
        """
        least = _FAINT**2 * self.factors.square().mean()
        inverse = self.factors / (self.factors.square() + least).clamp_min(1e-30)
        found = self._of(summand, positions)
        return found * inverse.to(found)


def _index(chain: Chain, shift: Tensor, factors: Tensor) -> Tensor:
    """For each output, in the layer's layout, where it stands in the flat summand."""
    y = chain.start
    number = torch.arange(y.numel(), device=y.device)
    place, digit = torch.zeros(factors.shape, dtype=torch.long, device=y.device), 1
    while digit < y.numel():
        digits = (number // digit % _DIGITS).to(y.dtype).view(y.shape)
        found = ((chain.pass_on(digits) - shift) / factors).nan_to_num(0.0, 0.0, 0.0)
        place += digit * found.round().long()
        digit *= _DIGITS
    index = torch.zeros_like(number)
    index[place.flatten().clamp(0, y.numel() - 1)] = number
    return index.view(y.shape)
