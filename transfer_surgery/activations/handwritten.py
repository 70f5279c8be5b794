"""Activations that networks write by hand, or that come with learned tensors.

Importing the package registers them. Where a formula rounds differently from torch's function of
that name, or differs in its derivative at a kink, it is a variant of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_surgery.activations.formulas import register_formula
from transfer_surgery.activations.registry import register_activation, register_variant

_CLAMPS: dict[Callable[..., Any], tuple[str, ...]] = {
    getattr(owner, name): ("min",) if name.startswith("clamp_min") else ("min", "max")
    for owner in (torch, Tensor)
    for name in ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
}


@register_activation("clamp", calls=_CLAMPS)
def _clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    return x.clone() if min is None and max is None else torch.clamp(x, min, max)


# At a bound, clamp passes the gradient and ReLU does not.
register_variant("relu", "clamp(x, 0)", lambda x: torch.clamp(x, min=0))
register_variant("relu6", "clamp(x, 0, 6)", lambda x: torch.clamp(x, 0, 6))
register_variant("relu", "maximum(x, zero)", lambda x, zero: torch.maximum(x, zero), ("zero",))


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


register_formula("tlu", "maximum(x, tau)", exact=True)
register_formula("quick_gelu", "x * sigmoid(1.702 * x)", exact=True)
register_formula("swish", "x * sigmoid(beta * x)", exact=True)
register_formula("parametric_swish", "x * sigmoid(x * v)", exact=True)
register_formula("squared_relu", "relu(x) ** 2", exact=True)
register_formula("squared_relu", "relu(x) * relu(x)")
register_formula("star_relu", "scale * relu(x) ** 2 + bias", exact=True)
register_formula("silu", "x * sigmoid(x)")
register_formula("mish", "x * tanh(softplus(x))")
register_formula("hardsigmoid", "relu6(x + 3) / 6")
register_formula("hardswish", "x * (relu6(x + 3) / 6)")
register_formula("hardswish", "x * relu6(x + 3) / 6")
register_formula("leaky_relu", "maximum(x, negative_slope * x)")
register_formula(
    "gelu(approximate='tanh')",
    "0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x ** 3)))",
)
register_formula("snake", "x + sin(a * x) ** 2 / a", exact=True)
