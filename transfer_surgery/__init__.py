"""transfer_surgery: change the activation functions of a trained network without breaking it."""

import transfer_surgery.builtin_activations
import transfer_surgery.handwritten  # noqa: F401 - both register what they define
from transfer_surgery.activations import get_activation, register_activation
from transfer_surgery.bake import bake
from transfer_surgery.baked_file import load_baked, save_baked
from transfer_surgery.checkpoint import load_gates, save_gates
from transfer_surgery.controllers import ScheduleEndedWarning, TransferRestartedWarning
from transfer_surgery.convert import convert, revert
from transfer_surgery.distill import distill
from transfer_surgery.export import export_onnx, export_program
from transfer_surgery.find import find_activations
from transfer_surgery.fold import fold_targets
from transfer_surgery.formulas import register_formula
from transfer_surgery.frozen import FrozenGatesWarning
from transfer_surgery.gates import register_gate
from transfer_surgery.history import History
from transfer_surgery.match import match_targets
from transfer_surgery.match_report import MatchWarning
from transfer_surgery.model_folder import load_model, save_model
from transfer_surgery.model_spec import ModelSpec
from transfer_surgery.optimizer import pause_transfer, resume_transfer, wrap_optimizer
from transfer_surgery.recompute import recompute_activations
from transfer_surgery.report import report
from transfer_surgery.risk import structural_risk
from transfer_surgery.schedule import TransferSchedule
from transfer_surgery.sensitivity import sensitivity
from transfer_surgery.sparsity import activation_sparsity
from transfer_surgery.swap import swap_targets
from transfer_surgery.unit import GatedActivation

__all__ = [
    "FrozenGatesWarning",
    "GatedActivation",
    "History",
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
