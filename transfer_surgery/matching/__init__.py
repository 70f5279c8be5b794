"""Fit targets to what the trained network computes, swap at once, let the original teach."""

from transfer_surgery.matching.distill_report import DistillReport, DistillWarning
from transfer_surgery.matching.distillation import distill
from transfer_surgery.matching.match import match_targets
from transfer_surgery.matching.match_report import MatchReport, MatchRow, MatchWarning
from transfer_surgery.matching.progress import Progress
from transfer_surgery.matching.site_costs import sensitivity
from transfer_surgery.matching.swap import swap_targets
from transfer_surgery.matching.swap_report import SwapReport, SwapStage
from transfer_surgery.matching.whole_swap import swap_activations

__all__ = [
    "DistillReport",
    "DistillWarning",
    "MatchReport",
    "MatchRow",
    "MatchWarning",
    "Progress",
    "SwapReport",
    "SwapStage",
    "distill",
    "match_targets",
    "sensitivity",
    "swap_activations",
    "swap_targets",
]
