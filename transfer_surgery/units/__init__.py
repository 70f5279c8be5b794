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
from transfer_surgery.units.kernels import (
    VARIABLE,
    Numbers,
    compiler_error,
    fitted_value,
    gated,
    kernel_choice,
)
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
    "Numbers",
    "SampledGate",
    "SampledSettings",
    "compiler_error",
    "fitted_value",
    "gate_settings",
    "gated",
    "gated_activations",
    "kernel_choice",
    "make_gate",
    "matching_units",
    "probability_of",
    "recompute_activations",
    "register_gate",
    "registered_gates",
    "spread",
    "stage_of",
]
