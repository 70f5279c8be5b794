"""What stands at a site: gates, and ``z * source + (1 - z) * target``."""

import transfer_surgery.units.gate_kinds  # noqa: F401 - registers the gates of the paper
from transfer_surgery.units.fitted_target import FittedActivation, Polynomial, TargetParameters
from transfer_surgery.units.float32 import Float32Module
from transfer_surgery.units.gated_activation import GatedActivation
from transfer_surgery.units.gates import (
    Gate,
    SampledGate,
    gate_settings,
    make_gate,
    probability_of,
    register_gate,
    registered_gates,
)
from transfer_surgery.units.granularity import (
    Granularity,
    PerChannel,
    PerLayer,
    PerNeuron,
    align,
    granularity_of,
)
from transfer_surgery.units.input_watchers import watched_inputs
from transfer_surgery.units.kernels import (
    VARIABLE,
    Numbers,
    compiler_error,
    fitted_value,
    gated,
    kernel_choice,
)
from transfer_surgery.units.module_settings import ModuleSettings
from transfer_surgery.units.noise import RecomputedGatesWarning
from transfer_surgery.units.recompute import recompute_activations
from transfer_surgery.units.selection import (
    as_patterns,
    check_gates_not_flattened,
    gated_activations,
    is_selected,
    matches_glob,
    select,
    select_units,
    stage_of,
)
from transfer_surgery.units.settings import (
    Bernoulli,
    Copy,
    GateSettings,
    HardConcrete,
    Line,
    SampledSettings,
)
from transfer_surgery.units.walkers import class_name

__all__ = [
    "VARIABLE",
    "Bernoulli",
    "Copy",
    "FittedActivation",
    "Float32Module",
    "Gate",
    "GateSettings",
    "GatedActivation",
    "Granularity",
    "HardConcrete",
    "Line",
    "ModuleSettings",
    "Numbers",
    "PerChannel",
    "PerLayer",
    "PerNeuron",
    "Polynomial",
    "RecomputedGatesWarning",
    "SampledGate",
    "SampledSettings",
    "TargetParameters",
    "align",
    "as_patterns",
    "check_gates_not_flattened",
    "class_name",
    "compiler_error",
    "fitted_value",
    "gate_settings",
    "gated",
    "gated_activations",
    "granularity_of",
    "is_selected",
    "kernel_choice",
    "make_gate",
    "matches_glob",
    "probability_of",
    "recompute_activations",
    "register_gate",
    "registered_gates",
    "select",
    "select_units",
    "stage_of",
    "watched_inputs",
]
