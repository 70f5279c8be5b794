"""What the paper reports, and what it claims of it: the numbers that ours stand beside."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLAIMS", "TABLE1", "Claim"]

TABLE1: dict[str, dict[str, tuple[float, float]]] = {
    "mnist": {
        "sin": (0.56, 0.53),
        "resin": (0.73, 0.60),
        "tanh": (0.76, 0.72),
        "relu": (0.89, 0.86),
        "Copy": (0.66, 0.61),
        "Line": (0.66, 0.55),
        "Bern": (0.70, 0.66),
        "resin->sin": (0.48, 0.48),
        "tanh->sin": (0.52, 0.49),
        "relu->sin": (0.50, 0.47),
    },
    "resnet20": {
        "sin": (11.39, 11.25),
        "resin": (10.41, 10.30),
        "tanh": (10.48, 10.33),
        "relu": (8.63, 8.47),
        "Copy": (10.94, 10.66),
        "Line": (10.59, 10.41),
        "Bern": (10.10, 9.85),
        "resin->sin": (8.53, 8.50),
        "tanh->sin": (8.67, 8.54),
        "relu->sin": (7.94, 7.55),
    },
    "resnet110": {"relu": (7.55, 7.49), "relu->sin": (5.99, 5.84)},
}
"""Top-1 error in percent, in the last epoch and the best of all epochs, of one training each."""

_SOFT = ("resin->sin", "tanh->sin", "relu->sin")
_NAIVE = ("Copy", "Line", "Bern")


@dataclass(frozen=True)
class Claim:
    """The paper says that one network has a smaller error than others.

    Args:
        words: the claim.
        pairs: (the better, the worse network).
    """

    words: str
    pairs: tuple[tuple[str, str], ...]


_AGAINST_SOURCE = Claim(
    "soft transfer beats its source", tuple((name, name.partition("->")[0]) for name in _SOFT)
)
_AGAINST_NAIVE = tuple(
    Claim(f"{soft} beats Copy, Line and Bern", tuple((soft, naive) for naive in _NAIVE))
    for soft in _SOFT
)
_AGAINST_SIN = Claim("soft transfer beats sin", tuple((soft, "sin") for soft in _SOFT))

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "bessel": (
        Claim("resin->sin fits best", (("resin->sin", "resin"), ("resin->sin", "sin"))),
        Claim("sin over-fits the noise: it is worse than resin", (("resin", "sin"),)),
    ),
    "mnist": (
        _AGAINST_SOURCE,
        *_AGAINST_NAIVE,
        _AGAINST_SIN,
        Claim("sin beats the monotonic ones", tuple(("sin", m) for m in ("resin", "tanh", "relu"))),
    ),
    "resnet20": (
        _AGAINST_SOURCE,
        *_AGAINST_NAIVE,
        _AGAINST_SIN,
        Claim(
            "sin is worse than the monotonic ones",
            tuple((m, "sin") for m in ("resin", "tanh", "relu")),
        ),
    ),
    "resnet110": (Claim("soft transfer beats its source", (("relu->sin", "relu"),)),),
}
"""Sections 4.3 and 4.4, by task. The claim of Figure 1 is about where one weight goes."""
