"""The built-in activations: the sources that networks have and the targets of section 4.1.

They use the very kernels that torch's modules and functions use, forward and backward, so that a
converted network computes the same bits. Importing the package registers them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery.activations.registry import register_activation


def _methods(name: str) -> dict[Callable[..., Any], tuple[str, ...]]:
    """The four names ``torch.f``, ``torch.f_``, ``Tensor.f``, ``Tensor.f_`` of an operator."""
    owners = (torch, torch.Tensor)
    return {getattr(o, n): () for o in owners for n in (name, f"{name}_") if hasattr(o, n)}


def _module_calls(name: str, *positional: str) -> dict[Callable[..., Any], tuple[str, ...]]:
    """``F.f(input, *positional, inplace)`` and, where it exists, ``F.f_``."""
    both = {getattr(F, name): (*positional, "inplace")}
    if hasattr(F, f"{name}_"):
        both[getattr(F, f"{name}_")] = positional
    return both


@register_activation("relu", calls=_module_calls("relu") | _methods("relu"), module=nn.ReLU)
def _relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@register_activation("relu6", calls=_module_calls("relu6"), module=nn.ReLU6)
def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


@register_activation(
    "leaky_relu", calls=_module_calls("leaky_relu", "negative_slope"), module=nn.LeakyReLU
)
def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return F.leaky_relu(x, negative_slope)


@register_activation("elu", calls=_module_calls("elu", "alpha"), module=nn.ELU)
def _elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@register_activation("selu", calls=_module_calls("selu") | _methods("selu"), module=nn.SELU)
def _selu(x: Tensor) -> Tensor:
    return F.selu(x)


@register_activation("celu", calls=_module_calls("celu", "alpha"), module=nn.CELU)
def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@register_activation("gelu", calls={F.gelu: ("approximate",)}, module=nn.GELU)
def _gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@register_activation("silu", calls=_module_calls("silu"), module=nn.SiLU)
def _silu(x: Tensor) -> Tensor:
    return F.silu(x)


@register_activation("mish", calls=_module_calls("mish"), module=nn.Mish)
def _mish(x: Tensor) -> Tensor:
    return F.mish(x)


@register_activation("hardswish", calls=_module_calls("hardswish"), module=nn.Hardswish)
def _hardswish(x: Tensor) -> Tensor:
    return F.hardswish(x)


@register_activation("hardsigmoid", calls=_module_calls("hardsigmoid"), module=nn.Hardsigmoid)
def _hardsigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


@register_activation(
    "hardtanh", calls=_module_calls("hardtanh", "min_val", "max_val"), module=nn.Hardtanh
)
def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return F.hardtanh(x, min_val, max_val)


@register_activation(
    "threshold", calls=_module_calls("threshold", "threshold", "value"), module=nn.Threshold
)
def _threshold(x: Tensor, threshold: float = 0.0, value: float = 0.0) -> Tensor:
    return F.threshold(x, threshold, value)


@register_activation("softplus", calls={F.softplus: ("beta", "threshold")}, module=nn.Softplus)
def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return F.softplus(x, beta, threshold)


@register_activation("tanh", calls=_methods("tanh") | {F.tanh: ()}, module=nn.Tanh)
def _tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@register_activation(
    "sigmoid",
    calls=_methods("sigmoid") | {F.sigmoid: (), torch.special.expit: ()},
    module=nn.Sigmoid,
)
def _sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@register_activation("softsign", calls={F.softsign: ()})
def _softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


@register_activation("logsigmoid", calls={F.logsigmoid: ()})
def _logsigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(x)


@register_activation("tanhshrink", calls={F.tanhshrink: ()})
def _tanhshrink(x: Tensor) -> Tensor:
    return F.tanhshrink(x)


@register_activation(
    "hardshrink", calls={F.hardshrink: ("lambd",), torch.Tensor.hardshrink: ("lambd",)}
)
def _hardshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return F.hardshrink(x, lambd)


@register_activation("softshrink", calls={F.softshrink: ("lambd",)})
def _softshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return F.softshrink(x, lambd)


@register_activation("resin")
def _resin(x: Tensor) -> Tensor:
    """Monotonically rectified sine, Eq. 2."""
    return torch.sin(x.clamp(-math.pi / 2, math.pi / 2))


# sin and cos are targets only: in trained networks their calls are position encodings.
@register_activation("sin")
def _sin(x: Tensor) -> Tensor:
    return torch.sin(x)


@register_activation("cos")
def _cos(x: Tensor) -> Tensor:
    return torch.cos(x)


@register_activation("snake")
def _snake(x: Tensor, a: float = 1.0) -> Tensor:
    return x + torch.sin(a * x) ** 2 / a


@register_activation("identity")
def _identity(x: Tensor) -> Tensor:
    return x.clone()  # a view of the input would be overwritten by a later in-place operation


@register_activation("square")
def _square(x: Tensor) -> Tensor:
    return x * x
