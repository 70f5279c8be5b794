"""Gates, models and baked networks on disk."""

from transfer_surgery.files.baked_file import load_baked, read_baked, save_baked
from transfer_surgery.files.export import export_onnx, export_program
from transfer_surgery.files.gate_tree import read_gates
from transfer_surgery.files.gates_file import load_gates, save_gates
from transfer_surgery.files.model_file import SPEC, load_model, load_weights, read_spec, save_model
from transfer_surgery.files.model_spec import ModelSpec, UnknownModelError
from transfer_surgery.files.safetensors_file import read_files, replace_file, require_safetensors

__all__ = [
    "SPEC",
    "ModelSpec",
    "UnknownModelError",
    "export_onnx",
    "export_program",
    "load_baked",
    "load_gates",
    "load_model",
    "load_weights",
    "read_baked",
    "read_files",
    "read_gates",
    "read_spec",
    "replace_file",
    "require_safetensors",
    "save_baked",
    "save_gates",
    "save_model",
]
