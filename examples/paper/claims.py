"""What the paper reports and claims, and whether our trainings bear it out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from results import Results
from scipy.stats import PermutationMethod, mannwhitneyu

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

LEVEL = 0.05
"""With three seeds of each network it is reached only where every seed of one beats all others."""

MEASURE = "conv"
"""The best epoch is chosen by its test error: that of the last one is the honest figure."""


@dataclass(frozen=True)
class Finding:
    """What our trainings say of one pair of a claim.

    Args:
        claim: in words.
        better: the network that has the smaller error, says the paper.
        worse: the other one.
        p: probability of so clear an order, this way, if the two were alike.
        reverse_p: the same for the other way.
    """

    claim: str
    better: str
    worse: str
    p: float
    reverse_p: float

    @property
    def verdict(self) -> str:
        """``"reproduced"``, ``"not reproduced"`` (the reverse is true) or ``"within noise"``."""
        if self.p <= LEVEL:
            return "reproduced"
        return "not reproduced" if self.reverse_p <= LEVEL else "within noise"


def findings(results: Results) -> Iterator[Finding]:
    """One for each pair of networks that the paper compares and that was trained here."""
    for claim in CLAIMS.get(results.task, ()):
        for better, worse in claim.pairs:
            if {better, worse} <= set(results.rows):
                scores = [results.scores(row, MEASURE) for row in (better, worse)]
                p, reverse = rank_sum_p(*scores), rank_sum_p(*reversed(scores))
                yield Finding(claim.words, better, worse, p, reverse)


def rank_sum_p(smaller: Sequence[float], larger: Sequence[float]) -> float:
    """One-sided p-value of the rank-sum test of Mann and Whitney, from all divisions.

    scipy's ``method="exact"`` has no ties, of which errors in hundredths of a percent have many;
    its test over all permutations has. Infinite values count as the worst.

    Examples:
        >>> rank_sum_p([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        0.05
    """
    if min(len(smaller), len(larger)) < 2:  # scipy's permutations need two of each
        return float(mannwhitneyu(smaller, larger, alternative="less", method="exact").pvalue)
    every = PermutationMethod(n_resamples=float("inf"))
    return float(mannwhitneyu(smaller, larger, alternative="less", method=every).pvalue)
