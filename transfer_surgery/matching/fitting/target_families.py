"""How ``a * f(w*x + c) + b`` is fitted: in closed form where `f` has one, else by a search in w, c.

A `Family` names the functions of the input in which a fit of the target is linear. Their argument
is the standardised input ``u = (x - mean) / std``, so that one grid suits every network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, degree_of

if TYPE_CHECKING:
    from transfer_surgery.matching.fitting.target_fit import Inputs

FREQUENCIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
"""Frequencies of sinusoids to try: ``w`` times the standard deviation of the input."""

SHIFTS = (0.0, -1.0, -0.5, 0.5, 1.0)
"""Shifts of other targets to try, in deviations of the input."""

BENDS = tuple(sorted((n / 10 for n in (*range(-6, 7), -15, -10, -8, 8, 10, 15)), key=abs))
"""The same for those that bend in one point, as ReLU."""

_LEAST_BEND = 5e-3
"""Least second coefficient of a parabola as a share of the first, for input of unit variance."""


class Candidate(NamedTuple):
    """Frequency and phase to try, for standardised input; one of each per group."""

    w: Tensor
    c: Tensor


class Family(Protocol):
    """How one target is fitted; the first axis of all tensors is that of the groups."""

    periodic: ClassVar[bool]
    range_share: ClassVar[float]
    """What the range of the inputs counts for beside the inputs, see `TargetFit.add_range`."""

    def candidates(self, inputs: Inputs) -> Iterator[Candidate]:
        """What to try, for inputs with these statistics."""

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        """The functions of ``u``, of its shape ``(groups, N)``, to be combined; the last is 1."""

    def parameters(self, solution: Tensor, candidate: Candidate) -> tuple[Tensor, ...]:
        """``(a, w, c, b, *k)`` for standardised input, from coefficients ``(groups, features)``."""


def family_of(target: Activation) -> Family:
    """The family of a target ``f``.

    Examples:
        >>> from transfer_surgery import get_activation
        >>> family_of(get_activation("square"))
        Square()
    """
    if target.name in ("sin", "cos"):
        return Sinusoid(phase=0.0 if target.name == "sin" else -math.pi / 2)
    if target.name == "square":
        return Square()
    if degree := degree_of(target):
        return Polynomial(degree)
    return Searched(target)


@dataclass(frozen=True)
class Sinusoid:
    """``p*sin(w*u) + q*cos(w*u) + b``: amplitude and phase in closed form, ``w`` from a grid."""

    periodic: ClassVar[bool] = True
    range_share: ClassVar[float] = 0.0

    phase: float
    frequencies: tuple[float, ...] = FREQUENCIES

    def candidates(self, inputs: Inputs) -> Iterator[Candidate]:
        std = inputs.std
        for frequency in self.frequencies:
            yield Candidate(torch.full_like(std, frequency), torch.zeros_like(std))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        argument = candidate.w[:, None] * u
        return [argument.sin(), argument.cos(), torch.ones_like(u)]

    def parameters(self, solution: Tensor, candidate: Candidate) -> tuple[Tensor, ...]:
        p, q, b = solution.unbind(1)
        return torch.hypot(p, q), candidate.w, torch.atan2(q, p) + self.phase, b


@dataclass(frozen=True)
class Square:
    """Any parabola, written by its vertex as ``A * (u + C)**2 + B``."""

    periodic: ClassVar[bool] = False
    range_share: ClassVar[float] = 0.0

    def candidates(self, inputs: Inputs) -> Iterator[Candidate]:
        yield Candidate(torch.ones_like(inputs.std), torch.zeros_like(inputs.std))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        return [u * u, u, torch.ones_like(u)]

    def parameters(self, solution: Tensor, candidate: Candidate) -> tuple[Tensor, ...]:
        second, first, zeroth = solution.unbind(1)
        # The vertex of a flat parabola is far away, and the gradient of its amplitude would be the
        # square of that distance: training would break. So a flat one is written as a wide parabola
        # at a distance of 1, and a straight line is bent a little, for the sake of float32.
        flat = second.abs() < first.abs()
        least = _LEAST_BEND * first.abs()
        bent = torch.where(second.abs() < least, torch.where(second < 0, -least, least), second)
        width = torch.where(flat, bent * 2 / torch.where(flat, first, 1.0), 1.0)
        wide = torch.where(flat, first / (2 * width), 1.0)
        high = torch.where(second.abs() < 1e-12, 1e-12, second)
        shift = torch.where(flat, 1.0, first / high / 2)
        amplitude = torch.where(flat, wide, high)
        return amplitude, candidate.w * width, shift, zeroth - amplitude * shift**2


@dataclass(frozen=True)
class Polynomial:
    """Any polynomial, of an argument that is between -1 and 1 for the inputs of the fit.

    A sample has few of the outermost inputs, and a polynomial that is free there grows from site to
    site until it overflows. So the range counts for a share of the data.

    The features are Hermite polynomials, which are orthogonal if the input has a normal
    distribution, so that the least squares are well conditioned for most inputs.
    """

    periodic: ClassVar[bool] = False
    range_share: ClassVar[float] = 0.002

    degree: int

    def candidates(self, inputs: Inputs) -> Iterator[Candidate]:
        low, high = inputs.ends
        w = 2 / (high - low).clamp_min(2.0)  # at least a deviation to each side
        yield Candidate(w, -w * (high + low) / 2)

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        hermite = [torch.ones_like(u), u]
        for n in range(1, self.degree):
            hermite.append((u * hermite[n] - n**0.5 * hermite[n - 1]) / (n + 1) ** 0.5)
        return hermite[::-1]

    def parameters(self, solution: Tensor, candidate: Candidate) -> tuple[Tensor, ...]:
        # The same polynomials, as coefficients of powers of v, where u = (v - c) / w.
        one = torch.zeros_like(solution)
        one[:, 0] = 1.0
        hermite = [one, _times_u(one, candidate)]
        for n in range(1, self.degree):
            following = _times_u(hermite[n], candidate) - n**0.5 * hermite[n - 1]
            hermite.append(following / (n + 1) ** 0.5)
        b, *k = (torch.stack(hermite[::-1], 1) * solution[..., None]).sum(1).unbind(1)
        a = torch.stack(k).norm(dim=0)
        shape = [torch.where(a > 0, part / a, 0.0) for part in k]
        return a, candidate.w, candidate.c, b, *shape


def _times_u(powers: Tensor, candidate: Candidate) -> Tensor:
    """A polynomial times ``u = (v - c) / w``, as coefficients ``(groups, powers of v)``."""
    higher = torch.cat([torch.zeros_like(powers[:, :1]), powers[:, :-1]], 1)
    return (higher - candidate.c[:, None] * powers) / candidate.w[:, None]


@dataclass(frozen=True)
class Searched:
    """Any target: amplitude and offset in closed form, frequency and phase from a grid.

    The grid contains the target as it is (``w = 1, c = 0``), wider and narrower ones, and ones for
    input of unit variance. A target such as ReLU, with ``f(2*x) = 2*f(x)``, needs no other `w`: it
    has more places for its bend instead.
    """

    periodic: ClassVar[bool] = False
    range_share: ClassVar[float] = 0.0

    target: Activation

    def candidates(self, inputs: Inputs) -> Iterator[Candidate]:
        mean, std = inputs.mean, inputs.std
        scales, shifts = [factor * std for factor in (1.0, 0.5, 2.0)], SHIFTS
        scales += [torch.full_like(std, factor) for factor in (0.5, 1.0, 2.0)]
        if _is_homogeneous(self.target):
            scales, shifts = scales[:1], BENDS
        for w, shift in product(scales, shifts):
            # w * (u + mean / std) is a multiple of x itself, moved by a share of its deviation.
            yield Candidate(w, w * (mean / std + shift))

    def features(self, u: Tensor, candidate: Candidate) -> list[Tensor]:
        return [
            self.target(candidate.w[:, None] * u + candidate.c[:, None]),
            torch.ones_like(u),
        ]

    def parameters(self, solution: Tensor, candidate: Candidate) -> tuple[Tensor, ...]:
        a, b = solution.unbind(1)
        return a, candidate.w, candidate.c, b


def _is_homogeneous(target: Activation) -> bool:
    x = torch.linspace(-4, 4, 33)
    return torch.allclose(target(2 * x), 2 * target(x), atol=1e-6)
