"""The architectures of Hugging Face transformers, as tiny models with random weights.

Each type of model stands for itself with its main class, ``"transformers:LlamaForCausalLM"``. Its
default configuration is made small by the names of its numbers. Some architectures ask for numbers
that agree in ways of their own, or for other inputs; these do not count.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

_TASKS = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM"),
    *("IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    *("SEQUENCE_CLASSIFICATION", "DEPTH_ESTIMATION", "SEMANTIC_SEGMENTATION"),
)
_HEADS, _WIDTH, _VOCABULARY, _SIDE = 4, 32, 100, 64
_SMALL = {
    2: ("layers", "n_layer", "depth", "num_blocks"),
    _HEADS: ("heads", "n_head", "experts"),
    _WIDTH // _HEADS: ("head_dim", "d_kv", "kv_channels"),
    _WIDTH: ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "projection_dim"),
    2 * _WIDTH: ("intermediate_size", "ffn_dim", "d_ff", "n_inner"),
    _VOCABULARY: ("vocab_size",),
    _SIDE: ("image_size",),
}
"""The largest that a number of a configuration may be, by the end of its name."""


def architectures() -> list[str]:
    """Names of the main class of each type of model."""
    tables = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in _TASKS]
    tables.append(modeling_auto.MODEL_MAPPING_NAMES)
    mains = [
        next(table[kind] for table in tables if kind in table)
        for kind in modeling_auto.MODEL_MAPPING_NAMES
    ]
    there = set(dir(transformers))  # a class is imported when it is asked for
    return [name for name in mains if isinstance(name, str) and name in there]


def module_of(name: str) -> str:
    """The module that defines an architecture, without importing it."""
    return f"transformers.{transformers._class_to_module[name]}"


def build_tiny(name: str) -> nn.Module:
    """An architecture with a tiny configuration."""
    transformers.logging.set_verbosity_error()
    cls: Any = getattr(transformers, name)
    return cls(_tiny(cls.config_class)).eval()


def tiny_inputs(name: str) -> dict[str, Tensor]:
    """By keyword, what an architecture takes: tokens, an image, a video or a sound."""
    cls: Any = getattr(transformers, name)
    config = _tiny(cls.config_class)
    tokens = torch.randint(4, _VOCABULARY, (2, 12))
    match cls.main_input_name:
        case "pixel_values":
            given = {"pixel_values": torch.randn(2, *_image(config))}
        case "pixel_values_videos":
            given = {"pixel_values_videos": torch.randn(2, 4, *_image(config))}
        case "input_values":
            given = {"input_values": torch.randn(2, 4000)}
        case "input_features":
            length = 2 * getattr(config, "max_source_positions", 100)
            given = {"input_features": torch.randn(2, getattr(config, "num_mel_bins", 80), length)}
        case _:
            given = {"input_ids": tokens}
    if "decoder_input_ids" in inspect.signature(cls.forward).parameters:
        given["decoder_input_ids"] = tokens
    return given


def _tiny(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default configuration of a class with small numbers, also in its parts."""
    config = cls()
    taken = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None) if name in config.sub_configs else None
        if isinstance(part, PreTrainedConfig):
            given[name] = _tiny(type(part))
        elif name in taken and type(value) is int:
            given[name] = _small(name, value)
        elif name in taken and name.endswith("layerdrop"):
            given[name] = 0.0  # which layers run would be another draw after conversion
        elif name in taken and name == "initializer_range":
            given[name] = 0.02  # where it is tiny, no activation would matter
    return cls(**given)


def _small(name: str, value: int) -> int:
    if name.endswith("token_id"):
        return value if value < _VOCABULARY else 3
    return next((min(value, most) for most, ends in _SMALL.items() if name.endswith(ends)), value)


def _image(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or _SIDE
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
