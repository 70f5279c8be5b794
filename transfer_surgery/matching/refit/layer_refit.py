"""New weights of a layer whose inputs have changed, by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.matching.fitting.normal_equations import NormalEquations, solve_few_rows
from transfer_surgery.matching.refit.linear_maps import LinearMap

RIDGES = (1e-2, 1e-1, 1.0)
"""What may pull refitted weights to the original ones, as a share of the inputs' mean square."""

_HELD_OUT = 4  # one of so many rows chooses the ridge

ROWS = 2**16
"""Rows that a layer is refitted to at most, in all batches and ranks together."""

_PER_INPUT = 128
"""Rows for each input of a layer. With half as many, held-out errors of ResNets grew a little."""
_LEAST_ROWS = 2**13

_ELEMENTS = 2**25  # of these rows: 128 MB
_MATRIX = 2**25  # elements of the normal equations' matrices: 256 MB; beyond it, few rows are used
_FEW_ROWS = 2**11


class LayerFit:
    """``min |W' x' + d - W x|^2 + ridge * |W' - W|^2`` over batches, ``x`` the original input.

    Args:
        layer: a linear layer or convolution.
        ridges: as shares of the mean square of the inputs. The one is taken by which three quarters
            of the rows foretell the others best; the middle one where there are fewer rows than
            inputs.
        offset: fit ``d`` of a layer that has no bias, for a batch norm behind it to take; the
            ``d`` of a layer that has a bias is always fitted.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer, x = torch.nn.Linear(3, 2), torch.randn(100, 3)
        >>> fit = LayerFit(layer, [1e-6])
        >>> y = layer(x)
        >>> fit.add(fit.map.rows(2 * x, y.shape, None), fit.map.outputs(y, None))
        >>> torch.allclose(fit.solve()["weight"], layer.weight / 2, atol=1e-3)
        True
    """

    def __init__(self, layer: Any, ridges: Sequence[float] = RIDGES, offset: bool = False) -> None:
        self.layer, self.ridges = layer, ridges
        self.offset = offset or layer.bias is not None
        self.map = LinearMap(layer)
        systems, inputs = self.map.groups, self.map.n_inputs
        self.is_wide = systems * inputs**2 > _MATRIX
        wished = max(_PER_INPUT * inputs, _LEAST_ROWS)
        self.limit = min(ROWS, wished, max(_ELEMENTS // (systems * inputs), 1))
        if self.is_wide:
            self.limit = min(self.limit, _FEW_ROWS)
        self._equations, self._held_out = NormalEquations(), NormalEquations()
        self._rows = 0
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.is_empty = True

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """Count a batch.

        Args:
            rows: what the layer gets now, ``(groups, positions, inputs)``.
            wanted: what it made of its original input, ``(groups, positions, outputs)``.
        """
        self.is_empty = False
        if self.is_wide:
            self._parts.append((rows, wanted))
            return
        wanted = wanted.to(rows)
        # The rows are in the order of the examples, so the last ones are of other examples. All
        # batches together hold out a quarter, also where each has few rows.
        before, self._rows = self._rows, self._rows + rows.shape[1]
        first = rows.shape[1] - (self._rows // _HELD_OUT - before // _HELD_OUT)
        self._equations.add(rows[:, :first], wanted[:, :first], self.offset)
        self._held_out.add(rows[:, first:], wanted[:, first:], self.offset)

    def solve(self) -> dict[str, Tensor]:
        """The weight, and the bias where there is to be one, in the layer's shapes and dtype.

        What was counted is forgotten then.
        """
        weights, bias = self._solve_few() if self.is_wide else self._solve_many()
        self._equations, self._held_out, self._parts = NormalEquations(), NormalEquations(), []
        like = self.layer.weight
        result = {"weight": self.map.weight_of(weights).to(like).contiguous()}
        if self.offset:
            result["bias"] = bias.flatten().to(like)
        return result

    def _before(self) -> tuple[Tensor, Tensor]:
        """Weights ``(groups, inputs, outputs)`` and biases ``(groups, 1, outputs)``."""
        weights = self.map.weights().double()
        if self.layer.bias is None:
            return weights, torch.zeros_like(weights[:, :1])
        return weights, self.layer.bias.detach().double().view(len(weights), 1, -1)

    def _solve_many(self) -> tuple[Tensor, Tensor]:
        inputs = self.map.n_inputs
        weights, bias = self._before()
        start = torch.cat([weights, bias], 1) if self.offset else weights

        def solution(equations: NormalEquations, ridge: float) -> Tensor:
            # All inputs may be 0: the ridge then keeps the weights that the layer has.
            share = equations.diagonal()[:, :inputs].mean(1, keepdim=True).clamp_min(1e-12)
            pull = torch.full_like(start[..., 0], 1e-9) * share
            pull[:, :inputs] += ridge * share
            return equations.solve(pull, start)

        for equations in (self._equations, self._held_out):
            equations.add_over_ranks()
        best = self.ridges[0]
        if len(self.ridges) > 1:
            foretold = {
                ridge: self._held_out.explained(solution(self._equations, ridge)).sum().item()
                for ridge in self.ridges
            }
            best = max(foretold, key=lambda ridge: (foretold[ridge], ridge))
        self._equations = self._equations.plus(self._held_out)
        found = solution(self._equations, best)
        return found[:, :inputs], found[:, inputs:]

    def _solve_few(self) -> tuple[Tensor, Tensor]:
        rows, wanted = (torch.cat(parts, 1) for parts in zip(*self._parts, strict=True))
        weights, bias = self._before()
        ridge = self.ridges[len(self.ridges) // 2] + 1e-9
        share = rows.square().sum(1).double().mean(1).clamp_min(1e-12)
        # An offset that nothing pulls is what centred rows do without.
        mean, middle = rows.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
        if self.offset:
            rows, wanted = rows - mean, wanted - middle
        found = solve_few_rows(rows, wanted, ridge * share, weights)
        return found, middle.double() - mean.double() @ found if self.offset else bias
