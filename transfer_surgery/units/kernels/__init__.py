"""Eq. 1 as one formula: in plain tensor code, evaluated again in backward, compiled."""

from transfer_surgery.units.kernels.engine import VARIABLE, compiler_error, kernel_choice
from transfer_surgery.units.kernels.formula import Numbers, fitted_value, gated_value
from transfer_surgery.units.kernels.gated import gated
from transfer_surgery.units.kernels.hard_concrete import hard_concrete, rectified
from transfer_surgery.units.kernels.recomputed import is_transformed, values_readable

__all__ = [
    "VARIABLE",
    "Numbers",
    "compiler_error",
    "fitted_value",
    "gated",
    "gated_value",
    "hard_concrete",
    "is_transformed",
    "kernel_choice",
    "rectified",
    "values_readable",
]
