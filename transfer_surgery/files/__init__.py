"""Gates, models and baked networks on disk."""

from transfer_surgery.files.baked_file import load_baked, load_network, save_baked
from transfer_surgery.files.export import export_onnx, export_program
from transfer_surgery.files.gates_file import load_gates, read_gates, save_gates
from transfer_surgery.files.model_file import load_model, load_weights, save_model
from transfer_surgery.files.model_spec import ModelSpec, UnknownModelError
from transfer_surgery.files.polynomials_file import save_polynomials
from transfer_surgery.files.replacing import check_is_file, check_replaceable, replace_file
from transfer_surgery.files.safetensors_file import check_not_lost, read_tensors

__all__ = [
    "ModelSpec",
    "UnknownModelError",
    "check_is_file",
    "check_not_lost",
    "check_replaceable",
    "export_onnx",
    "export_program",
    "load_baked",
    "load_gates",
    "load_model",
    "load_network",
    "load_weights",
    "read_gates",
    "read_tensors",
    "replace_file",
    "save_baked",
    "save_gates",
    "save_model",
    "save_polynomials",
]
