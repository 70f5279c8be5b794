"""Which parameters may be changed: plain trainable ones in memory that one module alone has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def sharing_parameters(model: nn.Module) -> set[nn.Module]:
    """The modules that have a tensor whose memory has another name, too.

    Whether it is the same parameter, another one with the same data, a buffer, or a tensor in a
    plain attribute, such as a transposed view.

    Examples:
        >>> one, other, third = (nn.Linear(2, 2, bias=False) for _ in range(3))
        >>> other.weight = nn.Parameter(one.weight.data)
        >>> sharing_parameters(nn.Sequential(one, other, third)) == {one, other}
        True
    """
    owned = [(module, tensor) for module in model.modules() for tensor in _tensors(module)]
    spans = [(str(tensor.device), *_span(tensor), module) for module, tensor in owned]
    spans.sort(key=lambda span: span[:3])
    found: set[nn.Module] = set()
    last_device, last_end, last_module = "", 0, model
    for device, start, end, module in spans:
        if device == last_device and start < last_end:
            found |= {module, last_module}
        if device != last_device or end > last_end:
            last_device, last_end, last_module = device, end, module
    return found


def why_not_plain(layer: nn.Module) -> str | None:
    """Why the weight and the bias of a layer must stay as they are, in a few words; None: change.

    Examples:
        >>> layer = nn.Linear(2, 2).requires_grad_(False)
        >>> why_not_plain(layer), why_not_plain(nn.utils.parametrizations.weight_norm(layer))
        ('is frozen', 'has a computed weight')
    """
    for name in ("weight", "bias"):
        tensor = getattr(layer, name, None)
        if tensor is None:
            if name == "weight":
                return "has no weight"
        elif name not in layer._parameters:
            return f"has a computed {name}"  # weight norm, pruning, parametrizations
        elif type(tensor) is not nn.Parameter:
            return f"has a {name} of class {type(tensor).__name__}"  # quantized, sharded
        elif tensor.is_meta:
            return "is offloaded"
        elif not tensor.is_floating_point():
            return f"has a {name} of {tensor.dtype}"
        elif not tensor.requires_grad:
            return "is frozen"
    if "forward" in vars(layer) or has_hooks(layer):
        return "has hooks"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether someone sees, or changes, what goes through a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Those of a module itself that have memory, under each name."""
    named = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    for value in named:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
            if plain and tensor.numel() and not tensor.is_meta:
                yield tensor


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte, and of the one behind the last."""
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.itemsize
