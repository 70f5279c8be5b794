"""Put units into a model, take them out, leave plain modules behind."""

from transfer_surgery.surgery.baking import bake, plain_module
from transfer_surgery.surgery.conversion import convert, revert
from transfer_surgery.surgery.folding import FoldReport, fold_targets
from transfer_surgery.surgery.insertion import insert_units
from transfer_surgery.surgery.refuse import check_model

__all__ = [
    "FoldReport",
    "bake",
    "check_model",
    "convert",
    "fold_targets",
    "insert_units",
    "plain_module",
    "revert",
]
