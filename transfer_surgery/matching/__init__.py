"""Fit targets to what the trained network computes, swap at once, let the original teach."""

from transfer_surgery.matching.distillation import distill
from transfer_surgery.matching.match import match_targets
from transfer_surgery.matching.match_report import MatchReport, MatchRow, MatchWarning
from transfer_surgery.matching.site_costs import sensitivity
from transfer_surgery.matching.swap import swap_targets

__all__ = [
    "MatchReport",
    "MatchRow",
    "MatchWarning",
    "distill",
    "match_targets",
    "sensitivity",
    "swap_targets",
]
