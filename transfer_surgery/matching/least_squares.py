"""Least squares summed over batches: of the targets of one site, or of the weights of a layer.

Only sums of products are kept, in float64; no activation is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_surgery.matching.target_families import Family
from transfer_surgery.units import Granularity

_CHUNK = 2**22
"""Elements of a feature that are worked on at a time: about 100 MB with everything made of them."""

_FAINT = 1 / 100
"""A group whose standard deviation is below this share of the mean over groups is treated as
constant. In trained ResNets groups are either well above this or far below it."""


class NormalEquations:
    """``min |X s - Y|^2 + sum of ridge * (s - start)^2``, with ``X`` and ``Y`` given in parts.

    Leading axes are systems of their own.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> equations, s = NormalEquations(), torch.randn(3, 1)
        >>> for x in torch.randn(4, 50, 3):
        ...     equations.add(x, x @ s)
        >>> torch.allclose(equations.solve(torch.zeros(3)).float(), s, atol=1e-5)
        True
    """

    def __init__(self) -> None:
        self.matrix: Tensor | float = 0.0
        self.vector: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Count rows.

        Args:
            x: ``(..., N, features)``.
            y: ``(..., N, outputs)``.
            weights: of the squared errors, ``(..., N)``.
        """
        weighted = (x if weights is None else x * weights[..., None]).transpose(-1, -2)
        self.matrix = self.matrix + (weighted @ x).double()
        self.vector = self.vector + (weighted @ y).double()

    def diagonal(self) -> Tensor:
        """Sums of squares of the features, ``(..., features)``."""
        return torch.as_tensor(self.matrix).diagonal(dim1=-2, dim2=-1)

    def solve(self, ridge: Tensor, start: Tensor | float = 0.0) -> Tensor:
        """The best coefficients, ``(..., features, outputs)``, in float64.

        Args:
            ridge: ``(..., features)``.
            start: what the ridge pulls the coefficients to.
        """
        pull = ridge.double()
        found: Tensor = torch.linalg.solve(
            self.matrix + torch.diag_embed(pull), self.vector + pull[..., None] * start
        )
        return found

    def explained(self, solution: Tensor) -> Tensor:
        """By how much a solution reduces the sum of squares of each system and output."""
        matrix, vector = torch.as_tensor(self.matrix), torch.as_tensor(self.vector)
        return (2 * solution * vector - solution * (matrix @ solution)).sum(-2)


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """An activation as ``(groups, N)``: the elements that share a gate, in float32 or wider."""
    return granularity.group(x.to(torch.promote_types(x.dtype, torch.float32)))


@dataclass
class Inputs:
    """Mean, deviation and range of what a site gets, per group."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    lowest: Tensor | float = math.inf
    highest: Tensor | float = -math.inf

    def add(self, x: Tensor) -> None:
        """Count a batch, ``(groups, N)``."""
        wide = x.double()
        self.count += x.shape[1]
        self.total = self.total + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)
        self.lowest = torch.minimum(x.amin(1), torch.as_tensor(self.lowest).to(x))
        self.highest = torch.maximum(x.amax(1), torch.as_tensor(self.highest).to(x))

    @property
    def mean(self) -> Tensor:
        """Per group, float64."""
        return torch.as_tensor(self.total) / self.count

    @property
    def std(self) -> Tensor:
        """What an input is standardised by, per group, float64: its standard deviation.

        A group that hardly varies gets the mean over those that do. With its own deviation its
        frequency would be thousands of times theirs, and as soon as training lets the channel vary
        again, it would turn every gradient into noise.
        """
        square = self.mean.square()
        variance = torch.as_tensor(self.squares) / self.count - square
        own = torch.where(variance > 1e-12 * square + 1e-30, variance.sqrt(), 0.0)
        varying = own > _FAINT * own.mean()
        return torch.where(varying, own, own[varying].mean() if varying.any() else 1.0)

    @property
    def span(self) -> Tensor:
        """Range of the standardised input per group, float64."""
        return (torch.as_tensor(self.highest) - torch.as_tensor(self.lowest)).double() / self.std


@dataclass(frozen=True)
class Solution:
    """``a * f(w*x + c) + b`` per group, float64, and what it leaves unexplained.

    Attributes:
        parameters: ``(a, w, c, b)``, each of the shape ``(groups,)``.
        residual: weighted sum of squared errors per group.
        total: weighted sum of squares about the weighted mean per group.
    """

    parameters: tuple[Tensor, Tensor, Tensor, Tensor]
    residual: Tensor
    total: Tensor


class TargetFit:
    """The least squares of one site, for all candidates of its family at once.

    Args:
        family: how targets of this kind are fitted.
        inputs: statistics of the site's inputs, which standardise its batches.
        ridge: added to the diagonal as a share of it, except for the offset.
    """

    def __init__(self, family: Family, inputs: Inputs, ridge: float) -> None:
        self.family, self.ridge = family, ridge
        self.mean, self.std = inputs.mean, inputs.std
        self.candidates = list(family.candidates(self.mean, self.std, inputs.span))
        self.equations = [NormalEquations() for _ in self.candidates]
        self.count: Tensor | float = 0.0
        self.sums: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Count a batch: inputs, values to be fitted, weights of errors; all ``(groups, N)``."""
        length = max(_CHUNK // x.shape[0], 1)
        for start in range(0, x.shape[1], length):
            part = slice(start, start + length)
            weight = None if weights is None else weights[:, part]
            self._add(x[:, part], y[:, part], weight)

    def _add(self, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        u = (x - self.mean[:, None].to(x)) / self.std[:, None].to(x)
        wide = y.double()
        counted = torch.ones_like(wide) if weights is None else weights.double()
        self.count = self.count + counted.sum(1)
        self.sums = self.sums + torch.stack([(counted * wide).sum(1), (counted * wide**2).sum(1)])
        for equations, candidate in zip(self.equations, self.candidates, strict=True):
            w, c = (part.to(x) for part in candidate)
            features = self.family.features(u, candidate._replace(w=w, c=c))
            weight = None if weights is None else weights.to(x)
            equations.add(torch.stack(features, 1).transpose(1, 2), y[..., None], weight)

    def solve(self) -> Solution:
        """The best candidate of each group."""
        total, squares = torch.as_tensor(self.sums)
        fits = [self._solve(index, squares) for index in range(len(self.candidates))]
        residual, best = torch.stack([residual for _, residual in fits]).min(0)
        a, w, c, b = (
            torch.stack(choices).gather(0, best[None])[0]
            for choices in zip(*(parameters for parameters, _ in fits), strict=True)
        )
        # The fit was made to the standardised input; these are for the input itself.
        parameters = (a, w / self.std, c - w * self.mean / self.std, b)
        return Solution(
            parameters, residual, (squares - total.square() / self.count).clamp_min(0.0)
        )

    def _solve(self, index: int, squares: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        equations = self.equations[index]
        # A feature that is always 0, or a constant input, leaves no pivot: hence the 1e-9.
        pull = self.ridge * equations.diagonal() + 1e-9 * torch.as_tensor(self.count)[:, None]
        pull[:, -1] = 0.0
        solution = equations.solve(pull)
        residual = (squares - equations.explained(solution)[:, 0]).clamp_min(0.0)
        return self.family.parameters(solution[..., 0], self.candidates[index]), residual
