"""Activations that networks write by hand, or that come with learned tensors.

Importing the package registers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_surgery.activations.formulas import register_formula
from transfer_surgery.activations.registry import register_activation

_CLAMPS: dict[Callable[..., Any], tuple[str, ...]] = {
    getattr(owner, name): ("min",) if name.startswith("clamp_min") else ("min", "max")
    for owner in (torch, Tensor)
    for name in ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
}


@register_activation("clamp", calls=_CLAMPS)
def _clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    return x.clone() if min is None and max is None else torch.clamp(x, min, max)


@register_activation("prelu", calls={F.prelu: ("weight",)}, operands=("weight",))
def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight)


@register_activation("tlu", operands=("tau",))
def _tlu(x: Tensor, tau: Tensor) -> Tensor:
    """Thresholded linear unit of filter response normalisation (Singh and Krishnan 2020)."""
    return torch.maximum(x, tau)


@register_activation("quick_gelu")
def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@register_activation("swish")
def _swish(x: Tensor, beta: float = 1.0) -> Tensor:
    return x * torch.sigmoid(beta * x)


@register_activation("parametric_swish", operands=("v",))
def _parametric_swish(x: Tensor, v: Tensor) -> Tensor:
    """The non-linearity of EvoNorm-S0 (Liu et al. 2020)."""
    return x * torch.sigmoid(x * v)


@register_activation("squared_relu")
def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


@register_activation("star_relu", operands=("scale", "bias"))
def _star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Squared ReLU with a learned scale and bias (Yu et al. 2022)."""
    return scale * torch.relu(x) ** 2 + bias


register_formula("tlu", "maximum(x, tau)")
register_formula("parametric_swish", "x * sigmoid(x * v)")
register_formula("star_relu", "scale * relu(x) ** 2 + bias")
register_formula("prelu", "where(x > 0, x, weight * x)")
