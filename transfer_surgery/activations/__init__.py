"""What an activation computes, and which torch calls mean it."""

import transfer_surgery.activations.builtin
import transfer_surgery.activations.handwritten  # noqa: F401 - both register what they define
from transfer_surgery.activations.calls import Call, argument_names, recognise, registered_name
from transfer_surgery.activations.formulas import register_formula
from transfer_surgery.activations.modules import ActivationModule, activation_module
from transfer_surgery.activations.operations import may_be_activation, overwrites
from transfer_surgery.activations.operators import name_of, tags_of
from transfer_surgery.activations.polynomial import degree_of, horner, start_coefficients
from transfer_surgery.activations.registry import (
    Activation,
    get_activation,
    get_target,
    register_activation,
    registered_activations,
)
from transfer_surgery.activations.tracker import Match, Record, Tracker, formula_of

__all__ = [
    "Activation",
    "ActivationModule",
    "Call",
    "Match",
    "Record",
    "Tracker",
    "activation_module",
    "argument_names",
    "degree_of",
    "formula_of",
    "get_activation",
    "get_target",
    "horner",
    "may_be_activation",
    "name_of",
    "overwrites",
    "recognise",
    "register_activation",
    "register_formula",
    "registered_activations",
    "registered_name",
    "start_coefficients",
    "tags_of",
]
