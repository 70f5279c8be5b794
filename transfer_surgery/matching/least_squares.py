"""Normal equations summed over batches in float64: no activation is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_surgery.matching.target_families import Family

_CHUNK = 2**22
"""Elements of a feature that are worked on at a time: some 100 MB with all made of them."""

_FAINT = 1 / 100
"""Share of the mean deviation below which one counts as none. In trained ResNets that of some
channels is a hundred to a million times smaller than the others'; next to none is in between."""


def grouped(x: Tensor, granularity: str, channel_axis: int) -> Tensor:
    """An activation as ``(groups, N)``: the elements that share a gate, in float32 or wider.

    Examples:
        >>> grouped(torch.zeros(2, 3, 4, 5), "channel", 1).shape
        torch.Size([3, 40])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if granularity == "layer":
        return x.reshape(1, -1)
    if granularity == "channel":
        return x.movedim(channel_axis, 0).flatten(1)
    return x.flatten(1).T


@dataclass
class Inputs:
    """Mean, deviation and range of what a site sees, per group."""

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
        """What an input is standardised by, per group, float64: its deviation.

        One that hardly varies, beside those of the other groups, gets the mean of those that do.
        By its own a frequency would be thousands of times theirs, and the first steps of training,
        which let the channel vary again, would make noise of it and of every gradient.
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


class NormalEquations:
    """The least-squares problems of all candidates of one site.

    Args:
        family: how fits of the target are found.
        inputs: of the site; what its batches are standardised by.
        ridge: added to the diagonal as a share of it, but not where the offset is.
    """

    def __init__(self, family: Family, inputs: Inputs, ridge: float) -> None:
        self.family, self.ridge = family, ridge
        self.mean, self.std = inputs.mean, inputs.std
        self.candidates = list(family.candidates(self.mean, self.std, inputs.span))
        self.count: Tensor | float = 0.0
        self.matrix: list[Tensor | float] = [0.0] * len(self.candidates)
        self.vector: list[Tensor | float] = [0.0] * len(self.candidates)
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
        counted = wide if weights is None else wide * weights.double()
        size = (
            torch.full_like(wide[:, 0], x.shape[1]) if weights is None else weights.double().sum(1)
        )
        self.count = self.count + size
        self.sums = self.sums + torch.stack([counted.sum(1), (counted * wide).sum(1)])
        for index, candidate in enumerate(self.candidates):
            w, c = (part.to(x) for part in candidate)
            features = torch.stack(self.family.features(u, candidate._replace(w=w, c=c)), 1)
            columns = torch.cat([features, y[:, None]], 1).transpose(1, 2)
            weighted = features if weights is None else features * weights[:, None].to(x)
            products = weighted @ columns
            self.matrix[index] = self.matrix[index] + products[:, :, :-1].double()
            self.vector[index] = self.vector[index] + products[:, :, -1].double()

    def solve(self) -> Solution:
        """The best candidate of each group."""
        total, squares = torch.as_tensor(self.sums)
        fits = [self._solve(i, squares) for i in range(len(self.candidates))]
        residuals = torch.stack([residual for _, residual in fits])
        residual, best = residuals.min(0)
        chosen = [
            torch.stack(choices).gather(0, best[None])[0]
            for choices in zip(*(parameters for parameters, _ in fits), strict=True)
        ]
        a, w, c, b = chosen
        # From standardised input to the input itself.
        parameters = (a, w / self.std, c - w * self.mean / self.std, b)
        return Solution(
            parameters, residual, (squares - total.square() / self.count).clamp_min(0.0)
        )

    def _solve(self, index: int, squares: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        matrix, vector = (torch.as_tensor(m[index]) for m in (self.matrix, self.vector))
        diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
        diagonal[:, :-1] *= self.ridge
        # A feature that is 0 throughout, or a constant input, leaves no pivot.
        diagonal[:, :-1] += 1e-9 * torch.as_tensor(self.count)[:, None]
        diagonal[:, -1] = 0.0
        solution = torch.linalg.solve(matrix + torch.diag_embed(diagonal), vector)
        explained = 2 * (solution * vector).sum(1)
        explained -= torch.einsum("gi,gij,gj->g", solution, matrix, solution)
        candidate = self.candidates[index]
        residual = (squares - explained).clamp_min(0.0)
        return self.family.parameters(solution, candidate), residual
