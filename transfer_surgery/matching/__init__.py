"""Fit targets to what the trained network computes, swap at once, let the original teach.

`match` and `one_pass` fit all sites and layers in one pass over the batches. Below them are the
folders `two_networks`, `fitting` and `refit`, above them `distilling` and `swapping`.
"""

from transfer_surgery.matching.answers import log_probabilities, logits_of
from transfer_surgery.matching.distilling.distill_report import DistillReport, DistillWarning
from transfer_surgery.matching.distilling.distillation import distill
from transfer_surgery.matching.distilling.penalty_context import range_penalty
from transfer_surgery.matching.match import match_targets
from transfer_surgery.matching.match_report import MatchReport, MatchRow, MatchWarning
from transfer_surgery.matching.progress import Progress
from transfer_surgery.matching.swapping.site_costs import sensitivity
from transfer_surgery.matching.swapping.swap import swap_targets
from transfer_surgery.matching.swapping.swap_report import SwapReport, SwapStage
from transfer_surgery.matching.swapping.whole_swap import swap_activations

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
    "log_probabilities",
    "logits_of",
    "match_targets",
    "range_penalty",
    "sensitivity",
    "swap_activations",
    "swap_targets",
]
