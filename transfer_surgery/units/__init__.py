"""What stands at a call site: gates, and ``z * source + (1 - z) * target``."""

from transfer_surgery.units.fitted_target import AffineActivation, AffineParameters
from transfer_surgery.units.gate_settings import (
    Bernoulli,
    Copy,
    GateSettings,
    HardConcrete,
    Line,
    SampledSettings,
)
from transfer_surgery.units.gated_activation import (
    GRANULARITIES,
    GatedActivation,
    gated_activations,
    matching_units,
    stage_of,
)
from transfer_surgery.units.gates import (
    Gate,
    SampledGate,
    gate_settings,
    make_gate,
    probability_of,
    register_gate,
    registered_gates,
)
from transfer_surgery.units.granularity import spread
from transfer_surgery.units.kernels import gated
from transfer_surgery.units.kernels.affine import affine_value
from transfer_surgery.units.kernels.triton.choice import VARIABLE, trusted_kernels
from transfer_surgery.units.recompute import recompute_activations

__all__ = [
    "GRANULARITIES",
    "VARIABLE",
    "AffineActivation",
    "AffineParameters",
    "Bernoulli",
    "Copy",
    "Gate",
    "GateSettings",
    "GatedActivation",
    "HardConcrete",
    "Line",
    "SampledGate",
    "SampledSettings",
    "affine_value",
    "gate_settings",
    "gated",
    "gated_activations",
    "make_gate",
    "matching_units",
    "probability_of",
    "recompute_activations",
    "register_gate",
    "registered_gates",
    "spread",
    "stage_of",
    "trusted_kernels",
]
