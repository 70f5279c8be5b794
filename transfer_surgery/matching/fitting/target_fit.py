"""Least squares of the target of one site, summed over batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_surgery.matching.fitting.normal_equations import NormalEquations
from transfer_surgery.matching.fitting.target_families import Candidate, Family
from transfer_surgery.matching.ranks import over_ranks

_CHUNK = 2**17
"""Elements of a feature that are worked on at a time, so that all made of them is in the cache."""

_LEAST = 16  # values of each group, however many groups there are

_POINTS = 65  # that stand for a range

_FAINT = 1 / 100
"""A group whose standard deviation is below this share of the mean over groups is treated as
constant. In trained ResNets groups are either well above this or far below it."""

_HELD = 1e15
"""What holds the offset at 0, where there shall be none, as a share of the diagonal."""


@dataclass
class Inputs:
    """Mean, deviation and range of what a site gets, per group."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    lowest: Tensor | float = math.inf
    highest: Tensor | float = -math.inf

    def add(self, x: Tensor, ends: Tensor | None = None) -> None:
        """Count a batch, or a sample of one.

        Args:
            x: ``(groups, N)``.
            ends: lowest and highest of the whole batch, ``(groups, 2)``; None: of the sample.
        """
        low, high = (x.amin(1), x.amax(1)) if ends is None else ends.unbind(1)
        wide = x.double()
        self.count += x.shape[1]
        self.total = self.total + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)
        self.lowest = torch.minimum(low, torch.as_tensor(self.lowest).to(low))
        self.highest = torch.maximum(high, torch.as_tensor(self.highest).to(high))

    def add_over_ranks(self) -> None:
        """Count the batches of all ranks."""
        like = torch.as_tensor(self.total)
        sums = [like.new_tensor(self.count), like, torch.as_tensor(self.squares)]
        count, self.total, self.squares = over_ranks(sums)
        self.count = int(count)
        (self.lowest,) = over_ranks([torch.as_tensor(self.lowest)], "MIN")
        (self.highest,) = over_ranks([torch.as_tensor(self.highest)], "MAX")

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
        low, high = self.ends
        return high - low

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest standardised input per group, float64."""
        low, high = (
            (torch.as_tensor(end).double() - self.mean) / self.std
            for end in (self.lowest, self.highest)
        )
        return low, high


@dataclass(frozen=True)
class Solution:
    """``a * f(w*x + c) + b`` per group, float64, and what it leaves unexplained.

    Attributes:
        parameters: ``(a, w, c, b)`` and the coefficients ``(k1, k2, ...)`` of a polynomial, each
            of the shape ``(groups,)``.
        residual: weighted sum of squared errors per group.
        total: weighted sum of squares about the weighted mean per group.
    """

    parameters: tuple[Tensor, ...]
    residual: Tensor
    total: Tensor


class TargetFit:
    """The least squares of one site, for all candidates of its family at once.

    Args:
        family: how targets of this kind are fitted.
        inputs: statistics of the site's inputs, which standardise its batches.
        ridge: added to the diagonal as a share of it, except for the offset.
        offset: False where the constant is to be 0 and the amplitude not negative; this is for the
            family `Searched`.
        made_up: without an offset, whether a layer behind makes up for it. Then it is fitted, and
            left out: SiLU is as low as -0.28, and what comes closest to it without an offset is
            further from its shape. What is left unexplained is counted with the offset.
    """

    def __init__(
        self,
        family: Family,
        inputs: Inputs,
        ridge: float,
        offset: bool = True,
        made_up: bool = False,
    ) -> None:
        self.family, self.ridge, self.offset, self.made_up = family, ridge, offset, made_up
        self.mean, self.std = inputs.mean, inputs.std
        self.candidates = list(family.candidates(inputs))
        self.equations = [NormalEquations() for _ in self.candidates]
        self.range = [NormalEquations() for _ in self.candidates]
        self.count: Tensor | float = 0.0
        self.sums: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Count a batch: inputs, values to be fitted, weights of errors; all ``(groups, N)``."""
        length = max(_CHUNK // x.shape[0], _LEAST)
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
            rows = self._rows(u, candidate, y)
            equations.add_joined(rows, None if weights is None else counted)

    def _rows(self, u: Tensor, candidate: Candidate, y: Tensor) -> Tensor:
        w, c = (part.to(u) for part in candidate)
        features = self.family.features(u, candidate._replace(w=w, c=c))
        # In float64: slow cosines are nearly constant, and their sums nearly cancel. The values of
        # a feature lie side by side, which makes their products several times as fast.
        return torch.stack([*features, y.to(u)], 1).double().transpose(1, 2)

    def add_range(self, inputs: Inputs, source: Callable[[Tensor], Tensor]) -> None:
        """Let the whole range count for a share of what was counted until now, if the family asks.

        Args:
            inputs: statistics of the site's inputs.
            source: what is to be fitted at inputs that are spread evenly over their range.
        """
        if not self.family.range_share:
            return
        low, high = (
            torch.as_tensor(end).double()[:, None] for end in (inputs.lowest, inputs.highest)
        )
        x = low + (high - low) * torch.linspace(0, 1, _POINTS).to(low)
        u = (x - self.mean[:, None]) / self.std[:, None]
        share = self.family.range_share / _POINTS * torch.as_tensor(self.count)[:, None]
        weights = torch.where(high > low, share, 0.0).expand_as(x)
        for equations, candidate in zip(self.range, self.candidates, strict=True):
            equations.add_joined(self._rows(u, candidate, source(x)), weights)

    def add_over_ranks(self) -> None:
        """Count the batches of all ranks."""
        for equations in self.equations:
            equations.add_over_ranks()
        self.count, self.sums = over_ranks(
            [torch.as_tensor(self.count), torch.as_tensor(self.sums)]
        )

    def solve(self) -> Solution:
        """The best candidate of each group."""
        total, squares = torch.as_tensor(self.sums)
        fits = [self._solve(index, squares) for index in range(len(self.candidates))]
        residual, best = torch.stack([residual for _, residual in fits]).min(0)
        a, w, c, b, *k = (
            torch.stack(choices).gather(0, best[None])[0]
            for choices in zip(*(parameters for parameters, _ in fits), strict=True)
        )
        # The fit was made to the standardised input; these are for the input itself.
        parameters = (a, w / self.std, c - w * self.mean / self.std, b, *k)
        return Solution(
            parameters, residual, (squares - total.square() / self.count).clamp_min(0.0)
        )

    def _solve(self, index: int, squares: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        equations = self.equations[index]
        # A feature that is always 0, or a constant input, leaves no pivot: hence the 1e-9.
        pull = self.ridge * equations.diagonal() + 1e-9 * torch.as_tensor(self.count)[:, None]
        pull[:, -1] = 0.0 if self.offset or self.made_up else _HELD * torch.as_tensor(self.count)
        solution = equations.plus(self.range[index]).solve(pull)
        if not self.offset:
            solution = self._without_sign(solution, index)
        residual = (squares - equations.explained(solution)[:, 0]).clamp_min(0.0)
        a, w, c, b, *k = self.family.parameters(solution[..., 0], self.candidates[index])
        return (a, w, c, b if self.offset else 0 * b, *k), residual

    def _without_sign(self, solution: Tensor, index: int) -> Tensor:
        """The amplitude without a sign that no layer before could take, and its best constant."""
        amplitude, constant = solution[:, :1].clamp_min(0.0), 0 * solution[:, 1:]
        if self.made_up:
            matrix, vector = self.equations[index].matrix, self.equations[index].vector
            sums, count = torch.as_tensor(matrix)[:, -1:, :1], torch.as_tensor(matrix)[:, -1:, 1:]
            constant = (torch.as_tensor(vector)[:, -1:] - amplitude * sums) / count
        return torch.cat([amplitude, constant], 1)
