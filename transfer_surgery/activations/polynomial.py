"""Polynomials of any degree, in Horner's form: additions and multiplications alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfer_surgery.activations.registry import Activation, register_activation


@register_activation("polynomial")
def _polynomial(x: Tensor, degree: int = 2) -> Tensor:
    """``0.25*x**2 + 0.5*x``; `match_targets` fits coefficients up to the degree to each site."""
    if degree < 2 or degree != int(degree):
        raise ValueError("the degree has to be a whole number, 2 or more")
    return (0.25 * x + 0.5) * x


def start_coefficients(degree: int) -> tuple[float, ...]:
    """The coefficients of ``x``, ``x**2`` and so on before a fit; it meets ReLU at -2, 0 and 2."""
    return (0.5, 0.25, *[0.0] * (degree - 2))


def degree_of(activation: Activation) -> int:
    """The degree of a polynomial, and 0 for other activations.

    Examples:
        >>> from transfer_surgery import get_activation
        >>> degree_of(get_activation("polynomial(degree=4)")), degree_of(get_activation("sin"))
        (4, 0)
    """
    return int(dict(activation.parameters)["degree"]) if activation.name == "polynomial" else 0


def horner(v: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """``k1*v + k2*v**2 + ...``, from ``(k1, k2, ...)``; there is at least one.

    Examples:
        >>> import torch
        >>> horner(torch.tensor([1.0, 2.0]), (torch.tensor(1.0), torch.tensor(10.0)))
        tensor([11., 42.])
    """
    y = coefficients[-1] * v
    for k in reversed(coefficients[:-1]):
        y = (y + k) * v
    return y
