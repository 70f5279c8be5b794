"""Put units into a model, take them out, leave plain modules behind."""

from transfer_surgery.surgery.baking import bake
from transfer_surgery.surgery.conversion import convert, revert
from transfer_surgery.surgery.folding import fold_targets
from transfer_surgery.surgery.insertion import insert_units
from transfer_surgery.surgery.refuse import refuse_unfit
from transfer_surgery.surgery.sparsity import activation_sparsity

__all__ = [
    "activation_sparsity",
    "bake",
    "convert",
    "fold_targets",
    "insert_units",
    "refuse_unfit",
    "revert",
]
