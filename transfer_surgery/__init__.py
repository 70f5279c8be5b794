"""transfer_surgery: change the activation functions of a trained network without breaking it."""

from transfer_surgery.activations import get_activation, register_activation, register_formula
from transfer_surgery.files import (
    ModelSpec,
    export_onnx,
    export_program,
    load_baked,
    load_gates,
    load_model,
    save_baked,
    save_gates,
    save_model,
)
from transfer_surgery.matching import (
    MatchWarning,
    distill,
    match_targets,
    sensitivity,
    swap_targets,
)
from transfer_surgery.reports import History, report
from transfer_surgery.sites import find_activations
from transfer_surgery.surgery import activation_sparsity, bake, convert, fold_targets, revert
from transfer_surgery.transfer import (
    FrozenGatesWarning,
    ScheduleEndedWarning,
    TransferRestartedWarning,
    TransferSchedule,
    pause_transfer,
    resume_transfer,
    structural_risk,
    wrap_optimizer,
)
from transfer_surgery.units import (
    Bernoulli,
    Copy,
    GatedActivation,
    HardConcrete,
    Line,
    recompute_activations,
    register_gate,
)

__all__ = [
    "Bernoulli",
    "Copy",
    "FrozenGatesWarning",
    "GatedActivation",
    "HardConcrete",
    "History",
    "Line",
    "MatchWarning",
    "ModelSpec",
    "ScheduleEndedWarning",
    "TransferRestartedWarning",
    "TransferSchedule",
    "activation_sparsity",
    "bake",
    "convert",
    "distill",
    "export_onnx",
    "export_program",
    "find_activations",
    "fold_targets",
    "get_activation",
    "load_baked",
    "load_gates",
    "load_model",
    "match_targets",
    "pause_transfer",
    "recompute_activations",
    "register_activation",
    "register_formula",
    "register_gate",
    "report",
    "resume_transfer",
    "revert",
    "save_baked",
    "save_gates",
    "save_model",
    "sensitivity",
    "structural_risk",
    "swap_targets",
    "wrap_optimizer",
]
