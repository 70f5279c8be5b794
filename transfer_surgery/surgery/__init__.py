"""Put units into a model, take them out, leave plain modules behind."""

from transfer_surgery.surgery.baked_modules import MixedActivation
from transfer_surgery.surgery.baking import bake, final_gates, outcome_of, plain_module
from transfer_surgery.surgery.checks import check_model, check_no_gates
from transfer_surgery.surgery.conversion import convert, revert
from transfer_surgery.surgery.fold_report import FoldReport
from transfer_surgery.surgery.folding import drop_folded_sites, fold_targets
from transfer_surgery.surgery.insertion import insert_units
from transfer_surgery.surgery.plain_weights import sharing_parameters, why_not_plain

__all__ = [
    "FoldReport",
    "MixedActivation",
    "bake",
    "check_model",
    "check_no_gates",
    "convert",
    "drop_folded_sites",
    "final_gates",
    "fold_targets",
    "insert_units",
    "outcome_of",
    "plain_module",
    "revert",
    "sharing_parameters",
    "why_not_plain",
]
