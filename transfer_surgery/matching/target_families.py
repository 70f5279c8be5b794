"""Least squares of ``a * f(w*x + c) + b``: closed forms where `f` has one, else a search in w, c.

A `Family` says of a target which functions of the input are linear in what is to be found. They are
taken of the standardised input ``u = (x - mean) / std``, where one grid suits every network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from transfer_surgery.activations import Activation

_LEAST_BEND = 5e-3
"""Of a parabola: its second coefficient as a share of the first, for input of unit variance."""


class Candidate(NamedTuple):
    """The part of a fit that is searched: frequency and phase, in units of standardised input."""

    w: Tensor
    c: Tensor


class Family(Protocol):
    """How the fits of one target are found; tensors have an axis of groups, which share a fit."""

    def candidates(self, mean: Tensor, std: Tensor, span: Tensor) -> Iterator[Candidate]:
        """What to try, one each per group; ``span`` is the range of the standardised data."""

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        """What the fit is linear in, of the shape ``(groups, N)`` of ``u``; the last one is 1."""

    def parameters(
        self, solution: Tensor, candidate: Candidate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(a, w, c, b)`` for standardised input from coefficients, ``(groups, features)``."""


def family_of(target: Activation, frequencies: tuple[float, ...], min_periods: float) -> Family:
    """The family of a target.

    Args:
        target: ``f``.
        frequencies: ``w`` times the standard deviation of the input, to try with a sinusoid.
        min_periods: a sinusoid has at least so many periods over the range of the data.

    Examples:
        >>> from transfer_surgery import get_activation
        >>> family_of(get_activation("sin"), (0.5, 1.0), 0.5)
        Sinusoid(phase=0.0, frequencies=(0.5, 1.0), min_periods=0.5)
    """
    keywords = dict(target.parameters)
    if target.name in ("sin", "cos"):
        phase = 0.0 if target.name == "sin" else -math.pi / 2
        return Sinusoid(phase, frequencies, min_periods)
    if target.name == "square":
        return Quadratic(1.0, 0.0, 0.0)
    if target.name == "polynomial" and keywords["a"] != 0:
        return Quadratic(keywords["a"], keywords["b"], keywords["c"])
    return Searched(target)


@dataclass(frozen=True)
class Sinusoid:
    """``p*sin(w*u) + q*cos(w*u) + b``: amplitude and phase in closed form, ``w`` from a grid."""

    phase: float
    frequencies: tuple[float, ...]
    min_periods: float

    def candidates(self, mean: Tensor, std: Tensor, span: Tensor) -> Iterator[Candidate]:
        # A range is at least two deviations, unless these are of other groups: then the input
        # hardly varies, and a period of it would be a very high frequency.
        lowest = torch.where(span > 1, 2 * math.pi * self.min_periods / span, 0.0)
        for frequency in self.frequencies:
            yield Candidate(lowest.clamp_min(frequency), torch.zeros_like(span))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        argument = candidate.w[:, None] * u
        return [argument.sin(), argument.cos(), torch.ones_like(u)]

    def parameters(
        self, solution: Tensor, candidate: Candidate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, q, b = solution.unbind(1)
        return torch.hypot(p, q), candidate.w, torch.atan2(q, p) + self.phase, b


@dataclass(frozen=True)
class Quadratic:
    """Any parabola, as ``A * f(u + C) + B`` of the one ``f(v) = a*v**2 + b*v + c``."""

    a: float
    b: float
    c: float

    def candidates(self, mean: Tensor, std: Tensor, span: Tensor) -> Iterator[Candidate]:
        yield Candidate(torch.ones_like(std), torch.zeros_like(std))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        return [u * u, u, torch.ones_like(u)]

    def parameters(
        self, solution: Tensor, candidate: Candidate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        second, first, zeroth = solution.unbind(1)
        # A flat parabola by its vertex, which is far away, has an amplitude whose gradient is the
        # square of that distance: training would break. It is a wide one near a fixed point where
        # `f` has a slope instead; a straight line is a little bent, for the sake of float32.
        start = 0.0 if self.b else 1.0
        slope = 2 * self.a * start + self.b
        flat = second.abs() < first.abs()
        least = _LEAST_BEND * first.abs()
        bent = torch.where(second.abs() < least, torch.where(second < 0, -least, least), second)
        width = torch.where(flat, bent * slope / (self.a * torch.where(flat, first, 1.0)), 1.0)
        wide = torch.where(flat, first / (slope * width), 1.0)
        high = torch.where(second.abs() < 1e-12, 1e-12, second) / self.a
        shift = torch.where(flat, start, (first / high - self.b) / (2 * self.a))
        amplitude = torch.where(flat, wide, high)
        offset = zeroth - amplitude * ((self.a * shift + self.b) * shift + self.c)
        return amplitude, candidate.w * width, shift, offset


@dataclass(frozen=True)
class Searched:
    """Any target: amplitude and offset in closed form, frequency and phase from a grid.

    The target as it is (``w = 1, c = 0``) is in the grid, and so are multiples of it and inputs of
    unit variance.
    """

    target: Activation

    def candidates(self, mean: Tensor, std: Tensor, span: Tensor) -> Iterator[Candidate]:
        scales = [factor * std for factor in (1.0, 0.5, 2.0)]
        scales += [torch.full_like(std, factor) for factor in (0.5, 1.0, 2.0)]
        for w, shift in product(scales, (0.0, -1.0, -0.5, 0.5, 1.0)):
            # w * (u + mean / std) is a multiple of x itself, moved by a share of its deviation.
            yield Candidate(w, w * (mean / std + shift))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        return [
            self.target(candidate.w[:, None] * u + candidate.c[:, None]),
            torch.ones_like(u),
        ]

    def parameters(
        self, solution: Tensor, candidate: Candidate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = solution.unbind(1)
        return a, candidate.w, candidate.c, b
