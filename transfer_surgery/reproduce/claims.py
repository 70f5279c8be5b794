"""Whether our trainings bear out the paper's claims: an exact test for each pair of networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from transfer_surgery.reproduce.paper import CLAIMS
from transfer_surgery.reproduce.results import Results

__all__ = ["LEVEL", "Finding", "exact_p", "findings"]

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
                p, reverse = exact_p(*scores), exact_p(*reversed(scores))
                yield Finding(claim.words, better, worse, p, reverse)


def exact_p(smaller: Sequence[float], larger: Sequence[float]) -> float:
    """One-sided p-value of the rank-sum test of Mann and Whitney, from all divisions.

    Args:
        smaller: the sample that is said to be the smaller one; infinite values count as the worst.
        larger: the other one.

    Returns:
        The share of all divisions of the pooled numbers into two such samples whose first one has
        ranks as low as these, or lower.

    Examples:
        >>> exact_p([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        0.05
    """
    pooled = sorted([*smaller, *larger])
    # Equal numbers share the mean of their ranks; twice the rank is then a whole number.
    rank = {x: 2 * pooled.index(x) + pooled.count(x) for x in pooled}
    found = sum(rank[x] for x in smaller)
    sums = [sum(part) for part in combinations([rank[x] for x in pooled], len(smaller))]
    return sum(value <= found for value in sums) / len(sums)
