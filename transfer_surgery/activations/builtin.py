"""The built-in activations: the sources that networks have and the targets of section 4.1.

They use the very kernels that torch's modules and functions use, forward and backward, so that a
converted network computes the same bits. Importing the package registers them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_surgery.activations.registry import register_activation

_aten = torch.ops.aten


def _methods(name: str) -> dict[Callable[..., Any], tuple[str, ...]]:
    """The four spellings ``torch.f``, ``torch.f_``, ``Tensor.f``, ``Tensor.f_`` of an operator."""
    owners = (torch, torch.Tensor)
    return {getattr(o, n): () for o in owners for n in (name, f"{name}_") if hasattr(o, n)}


def _module_calls(name: str, *positional: str) -> dict[Callable[..., Any], tuple[str, ...]]:
    """``F.f(input, *positional, inplace)`` and, where it exists, ``F.f_``."""
    both = {getattr(F, name): (*positional, "inplace")}
    if hasattr(F, f"{name}_"):
        both[getattr(F, f"{name}_")] = positional
    return both


@register_activation(
    "relu",
    backward=lambda g, x: _aten.threshold_backward(g, x, 0),
    calls=_module_calls("relu") | _methods("relu"),
)
def _relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@register_activation(
    "relu6",
    backward=lambda g, x: _aten.hardtanh_backward(g, x, 0.0, 6.0),
    calls=_module_calls("relu6"),
)
def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


@register_activation(
    "leaky_relu",
    backward=lambda g, x, negative_slope: _aten.leaky_relu_backward(g, x, negative_slope, False),
    calls=_module_calls("leaky_relu", "negative_slope"),
)
def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return F.leaky_relu(x, negative_slope)


@register_activation(
    "elu",
    backward=lambda g, x, alpha: _aten.elu_backward(g, alpha, 1, 1, False, x),
    calls=_module_calls("elu", "alpha"),
)
def _elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@register_activation(
    "selu",
    backward=lambda g, x: _aten.elu_backward(g, *_SELU, 1, False, x),
    calls=_module_calls("selu") | _methods("selu"),
)
def _selu(x: Tensor) -> Tensor:
    return F.selu(x)


@register_activation(
    "celu",
    backward=lambda g, x, alpha: _aten.elu_backward(g, alpha, 1, 1 / alpha, False, x),
    calls=_module_calls("celu", "alpha"),
)
def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@register_activation(
    "gelu",
    backward=lambda g, x, approximate: _aten.gelu_backward(g, x, approximate=approximate),
    calls={F.gelu: ("approximate",)},
)
def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


# The kernels of silu and mish have no derivative: where a graph is asked for, formulas that have.
def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        result: Tensor = _aten.silu_backward(g, x)
        return result
    s = torch.sigmoid(x)
    return g * (s * (1 + x * (1 - s)))


def _mish_backward(g: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        result: Tensor = _aten.mish_backward(g, x)
        return result
    s, t = torch.sigmoid(x), torch.tanh(F.softplus(x))
    return g * (t + x * s * (1 - t * t))


@register_activation("silu", backward=_silu_backward, calls=_module_calls("silu"))
def _silu(x: Tensor) -> Tensor:
    return F.silu(x)


@register_activation("mish", backward=_mish_backward, calls=_module_calls("mish"))
def _mish(x: Tensor) -> Tensor:
    return F.mish(x)


@register_activation(
    "hardswish",
    backward=lambda g, x: _aten.hardswish_backward(g, x),
    calls=_module_calls("hardswish"),
)
def _hardswish(x: Tensor) -> Tensor:
    return F.hardswish(x)


@register_activation(
    "hardsigmoid",
    backward=lambda g, x: _aten.hardsigmoid_backward(g, x),
    calls=_module_calls("hardsigmoid"),
)
def _hardsigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


@register_activation(
    "hardtanh",
    backward=lambda g, x, min_val, max_val: _aten.hardtanh_backward(g, x, min_val, max_val),
    calls=_module_calls("hardtanh", "min_val", "max_val"),
)
def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return F.hardtanh(x, min_val, max_val)


@register_activation("threshold", calls=_module_calls("threshold", "threshold", "value"))
def _threshold(x: Tensor, threshold: float = 0.0, value: float = 0.0) -> Tensor:
    return F.threshold(x, threshold, value)


@register_activation(
    "softplus",
    backward=lambda g, x, beta, threshold: _aten.softplus_backward(g, x, beta, threshold),
    calls={F.softplus: ("beta", "threshold")},
)
def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return F.softplus(x, beta, threshold)


@register_activation(
    "tanh",
    backward=lambda g, x: _aten.tanh_backward(g, torch.tanh(x)),
    calls=_methods("tanh") | {F.tanh: ()},
)
def _tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@register_activation(
    "sigmoid",
    backward=lambda g, x: _aten.sigmoid_backward(g, torch.sigmoid(x)),
    calls=_methods("sigmoid") | {F.sigmoid: (), torch.special.expit: ()},
)
def _sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@register_activation(
    "resin", backward=lambda g, x: torch.where(x.abs() < math.pi / 2, g * torch.cos(x), 0.0)
)
def _resin(x: Tensor) -> Tensor:
    """Monotonically rectified sine, Eq. 2."""
    return torch.sin(x.clamp(-math.pi / 2, math.pi / 2))


# sin and cos are targets only: in trained networks their calls are position encodings.
@register_activation("sin", backward=lambda g, x: g * torch.cos(x))
def _sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@register_activation("cos", backward=lambda g, x: -g * torch.sin(x))
def _cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@register_activation("snake", backward=lambda g, x, a: g * (1 + torch.sin(2 * a * x)))
def _snake(x: Tensor, a: float = 1.0) -> Tensor:
    return x + torch.sin(a * x) ** 2 / a


@register_activation("identity", backward=lambda g, x: g)
def _identity(x: Tensor) -> Tensor:
    return x.clone()  # a view of the input would be overwritten by a later in-place operation


@register_activation("square", backward=lambda g, x: g * (2 * x))
def _square(x: Tensor) -> Tensor:
    return x * x


@register_activation("polynomial", backward=lambda g, x, a, b, c: g * (2 * a * x + b))
def _polynomial(x: Tensor, a: float = 0.25, b: float = 0.5, c: float = 0.0) -> Tensor:
    """``a*x**2 + b*x + c``; the defaults meet ReLU at -2, 0 and 2."""
    return (a * x + b) * x + c
