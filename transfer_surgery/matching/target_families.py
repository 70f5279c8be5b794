"""How ``a * f(w*x + c) + b`` is fitted: in closed form where `f` has one, else by a search in w, c.

A `Family` names the functions of the input in which a fit of the target is linear. Their argument
is the standardised input ``u = (x - mean) / std``, so that one grid suits every network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from transfer_surgery.activations import Activation

FREQUENCIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
"""Frequencies of sinusoids to try: ``w`` times the standard deviation of the input."""

_LEAST_BEND = 5e-3
"""Least second coefficient of a parabola as a share of the first, for input of unit variance."""


class Candidate(NamedTuple):
    """Frequency and phase to try, for standardised input; one of each per group."""

    w: Tensor
    c: Tensor


class Family(Protocol):
    """How one target is fitted; the first axis of all tensors is that of the groups."""

    periodic: ClassVar[bool]

    def candidates(self, mean: Tensor, std: Tensor) -> Iterator[Candidate]:
        """What to try."""

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        """The functions of ``u``, of its shape ``(groups, N)``, to be combined; the last is 1."""

    def parameters(
        self, solution: Tensor, candidate: Candidate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(a, w, c, b)`` for standardised input, from coefficients ``(groups, features)``."""


def family_of(target: Activation) -> Family:
    """The family of a target ``f``.

    Examples:
        >>> from transfer_surgery import get_activation
        >>> family_of(get_activation("square"))
        Quadratic(a=1.0, b=0.0, c=0.0)
    """
    keywords = dict(target.parameters)
    if target.name in ("sin", "cos"):
        return Sinusoid(phase=0.0 if target.name == "sin" else -math.pi / 2)
    if target.name == "square":
        return Quadratic(1.0, 0.0, 0.0)
    if target.name == "polynomial" and keywords["a"] != 0:
        return Quadratic(keywords["a"], keywords["b"], keywords["c"])
    return Searched(target)


@dataclass(frozen=True)
class Sinusoid:
    """``p*sin(w*u) + q*cos(w*u) + b``: amplitude and phase in closed form, ``w`` from a grid."""

    periodic: ClassVar[bool] = True

    phase: float
    frequencies: tuple[float, ...] = FREQUENCIES

    def candidates(self, mean: Tensor, std: Tensor) -> Iterator[Candidate]:
        for frequency in self.frequencies:
            yield Candidate(torch.full_like(std, frequency), torch.zeros_like(std))

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
    """Any parabola, written as ``A * f(u + C) + B`` with ``f(v) = a*v**2 + b*v + c``."""

    periodic: ClassVar[bool] = False

    a: float
    b: float
    c: float

    def candidates(self, mean: Tensor, std: Tensor) -> Iterator[Candidate]:
        yield Candidate(torch.ones_like(std), torch.zeros_like(std))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        return [u * u, u, torch.ones_like(u)]

    def parameters(
        self, solution: Tensor, candidate: Candidate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        second, first, zeroth = solution.unbind(1)
        # The vertex of a flat parabola is far away. Written by its vertex, the gradient of its
        # amplitude would be the square of that distance, and training would break. So a flat one is
        # written as a wide parabola near a fixed point where `f` has a slope, and a straight line
        # is bent a little, for the sake of float32.
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

    The grid contains the target as it is (``w = 1, c = 0``), wider and narrower ones, and ones for
    input of unit variance.
    """

    periodic: ClassVar[bool] = False

    target: Activation

    def candidates(self, mean: Tensor, std: Tensor) -> Iterator[Candidate]:
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
