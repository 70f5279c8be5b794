"""Facts that tensors carry through the finder's run, by the rules measured on both zoos.

Where a tensor's channels are, whether it depends on the model's input, whether it is all zero, and
which sigmoid it comes from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, tags_of

_CHANNELS_FIRST = {
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *("batch_norm", "group_norm", "instance_norm"),
}
_CHANNELS_LAST = {"linear", "layer_norm", "rms_norm", "embedding", "bilinear"}
_RESHAPES = {
    *("reshape", "view", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis"),
    *("swapaxes", "swapdims", "squeeze", "unsqueeze", "t", "matmul", "bmm", "einsum", "__matmul__"),
}
_PRODUCTS = {"matmul", "bmm", "mm", "__matmul__"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_GATES = {"sigmoid", "hardsigmoid"}
SQUASHING = _GATES | {"tanh", "hardtanh", "softplus"}
"""Activations that, returned by the model, make its outputs."""


def is_reduction(name: str) -> bool:
    """Whether a torch function sums up, or finds the largest of, several numbers."""
    return torch.Tag.reduction in tags_of(name)


def mark_constant(tensor: Tensor) -> None:
    """Say that a tensor does not depend on the input."""
    tensor._ts_live = False  # type: ignore[attr-defined]


def mark_live(tensor: Tensor) -> None:
    """Say that a tensor depends on the input."""
    tensor._ts_live, tensor._ts_zero = True, False  # type: ignore[attr-defined]


def is_live(x: Tensor) -> bool:
    """Whether a tensor depends on the model's input; a tensor of unknown origin is an input."""
    return getattr(x, "_ts_live", True)


def is_zero(x: Tensor) -> bool:
    """Whether a tensor was made as zeros."""
    return getattr(x, "_ts_zero", False)


def is_from_layer(x: Tensor) -> bool:
    """Whether a tensor comes straight from a layer, and where its channels are is known."""
    return getattr(x, "_ts_axis", None) is not None


def channel_axis(x: Tensor) -> int:
    """From the layer that produced ``x``; else 1 for images and volumes, -1 for tokens."""
    axis = getattr(x, "_ts_axis", None)
    if axis is None:
        return 1 if x.dim() >= 4 else -1
    return int(axis)


def role_of(activation: Activation, x: Tensor) -> str:
    """The role of an activation of ``x``, as far as it can be known before its result is used."""
    if activation.name in _GATES:
        return "gating"
    written = str(dict(activation.parameters).get("variant", ""))
    is_clamp = activation.name in ("clamp", "tlu") or (
        written != "" and activation.name in ("relu", "relu6")
    )
    # Of what comes straight from a layer a clamp at 0 is an activation; else it bounds coordinates.
    is_hidden = is_from_layer(x) and activation.name != "clamp"
    return "bounding" if is_clamp and not is_hidden else "hidden"


def follow(name: str, inputs: list[Tensor], outputs: list[Tensor], gate: Any = None) -> None:
    """Carry the facts from the inputs of a torch call to its outputs.

    Args:
        name: name of the torch function.
        inputs: its tensors.
        outputs: the tensors that it returned.
        gate: the event of a gating sigmoid, if that is what the call is.
    """
    live = any(is_live(x) for x in inputs) and name not in _ZEROS
    like = max(inputs, key=Tensor.numel, default=None)
    layer = name in _CHANNELS_FIRST or name in _CHANNELS_LAST
    sigmoid = getattr(inputs[0], "_ts_sigmoid", None) if inputs else None
    if layer and sigmoid is not None:
        sigmoid.role = "hidden"  # it feeds the next layer instead of multiplying something
    for out in outputs:
        facts: Any = out
        if name in _CHANNELS_FIRST:
            facts._ts_axis = 1
        elif name in _CHANNELS_LAST:
            facts._ts_axis = -1
        elif name in _PRODUCTS and len(inputs) == 2 and is_live(inputs[0]) != is_live(inputs[1]):
            # The weight makes the channels: rows where it stands on the left, else columns.
            facts._ts_axis = -1 if is_live(inputs[0]) or out.dim() < 2 else -2
        elif name in _RESHAPES or is_reduction(name) or like is None or like.dim() != out.dim():
            facts._ts_axis = None
        else:
            facts._ts_axis = getattr(like, "_ts_axis", None)
        facts._ts_live, facts._ts_zero = live, name in _ZEROS
        facts._ts_sigmoid = gate or (sigmoid if len(inputs) == 1 and not layer else None)
