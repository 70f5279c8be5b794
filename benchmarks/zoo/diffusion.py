"""Models of Hugging Face diffusers with tiny configurations and random weights.

Each stands for itself, ``"diffusers:UNet2DModel"``. What a class needs cannot be read off its
signature, so its configuration and its inputs are in ``diffusion.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_MODELS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
_VALUES = {
    "times": lambda: torch.tensor([3, 700]),
    "factors": lambda: torch.tensor([0.3, 0.8]),
    "labels": lambda: torch.tensor([1, 3]),
}
_FILLED = {
    "normal": torch.randn,
    "ones": torch.ones,
    "masks": lambda *shape: torch.ones(*shape, dtype=torch.bool),
    "zeros": lambda *shape: torch.zeros(*shape, dtype=torch.int64),
    "tokens": lambda *shape: torch.randint(24, shape),
}


def diffusion_models() -> list[str]:
    """Names of the classes."""
    return list(_MODELS)


def build_diffusion(name: str) -> nn.Module:
    """A model with its tiny configuration."""
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**_MODELS[name]["config"])
    return model.eval()


def diffusion_inputs(name: str) -> dict[str, Any]:
    """What a model takes, by keyword; ``"normal 2x3"`` stands for random numbers of that shape."""

    def make(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        kind, _, shape = value.partition(" ")
        return _FILLED[kind](*map(int, shape.split("x"))) if shape else _VALUES[kind]()

    made: dict[str, Any] = pytree.tree_map(make, _MODELS[name]["inputs"])
    return made
