"""Facts that tensors carry through the finder's run, by the rules measured on both zoos.

Where a tensor's channels are, whether it depends on the model's input, whether it is all zero, and
which activation it comes from.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, tags_of

_CHANNELS_FIRST = {
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *("batch_norm", "group_norm", "instance_norm"),
}
_CHANNELS_LAST = {"linear", "layer_norm", "rms_norm", "embedding", "bilinear"}
_RESHAPES = {"reshape", "view", "flatten", "unflatten"}
_PRODUCTS = {"matmul", "bmm", "mm", "__matmul__", "__rmatmul__"}
_SUMS_OF_PRODUCTS = {"addmm", "addbmm", "baddbmm"}
_NO_CHANNELS = 0
"""Instead of an axis: both factors of a product depend on the input, as in attention's scores."""
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_GATES = {"sigmoid", "hardsigmoid"}
NOT_LIVE = "it does not depend on the input"
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


def is_known(x: Tensor) -> bool:
    """Whether a tensor was given to the model, or made by a call that was seen."""
    return hasattr(x, "_ts_live")


def is_live(x: Tensor) -> bool:
    """Whether a tensor depends on the model's input; a tensor of unknown origin is an input."""
    return getattr(x, "_ts_live", True)


def why_not(x: Tensor) -> str | None:
    """Why an activation of x has no gates; None where it may."""
    if not is_live(x):
        return NOT_LIVE
    if x.is_nested:
        return "its input is a nested tensor"
    return None if x.is_floating_point() else f"its input is {x.dtype}"


def is_zero(x: Tensor) -> bool:
    """Whether a tensor was made as zeros."""
    return getattr(x, "_ts_zero", False)


def is_from_layer(x: Tensor) -> bool:
    """Whether a tensor comes straight from a layer, and where its channels are is known."""
    return getattr(x, "_ts_axis", None) not in (None, _NO_CHANNELS)


def channel_axis(x: Tensor) -> int:
    """From the layer that produced ``x``; else 1 for images and volumes, -1 for tokens."""
    axis = getattr(x, "_ts_axis", None)
    if axis is None:
        return 1 if x.dim() >= 4 else -1
    return int(axis)


def memory_of(x: Tensor) -> int:
    """What tensors that share memory have in common."""
    try:
        return int(x.untyped_storage()._cdata)
    except NotImplementedError:  # sparse tensors and those inside vmap have no storage
        return id(x)


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


def follow(
    name: str, inputs: list[Tensor], outputs: list[Tensor], event: Any = None, text: str = ""
) -> None:
    """Carry the facts from the inputs of a torch call to its outputs.

    Args:
        name: name of the torch function.
        inputs: its tensors.
        outputs: the tensors that it returned.
        event: that of the activation call, if it is one.
        text: the equation of an einsum.
    """
    live = any(is_live(x) for x in inputs) and name not in _ZEROS
    layer = name in _CHANNELS_FIRST or name in _CHANNELS_LAST
    passes = len(inputs) == 1 and not layer and not is_reduction(name)
    origins = [origin for x in inputs if (origin := origin_of(x)) is not None]
    for origin in origins:
        origin.is_read |= event is not None or not passes
        if layer and origin is origin_of(inputs[0]) and origin.role == "gating":
            origin.role = "hidden"  # it feeds the next layer instead of multiplying something
        elif "mul" in name and origin.source.name == "softplus" and len(inputs) > 1:
            origin.role = "bounding"  # a step size or a scale, which must be positive
    for out in outputs:
        facts: Any = out
        facts._ts_axis = _axis_of(name, inputs, out, text)
        facts._ts_live, facts._ts_zero = live, name in _ZEROS
        facts._ts_from = event or (origins[0] if passes and origins else None)


def origin_of(x: Tensor) -> Any:
    """The event of the activation that a tensor comes from, by steps that take nothing else."""
    return getattr(x, "_ts_from", None)


def _axis_of(name: str, inputs: list[Tensor], out: Tensor, text: str) -> int | None:
    """Where the channels of a result are; None where that cannot be told."""
    if out.is_nested or any(x.is_nested for x in inputs):
        return None  # it has no shape
    if name in _CHANNELS_FIRST:
        return 1
    if name in _CHANNELS_LAST:
        return -1
    if name == "einsum":
        return _axis_of_einsum(text, inputs, out)
    if name in _PRODUCTS:
        return _axis_of_product(inputs, out)
    if name in _SUMS_OF_PRODUCTS:
        return _axis_of_product(inputs[1:], out)
    like = max(inputs, key=Tensor.numel, default=None)
    axis = None if like is None else getattr(like, "_ts_axis", None)
    if like is None or axis is None or is_reduction(name):
        return None
    if axis == _NO_CHANNELS:
        return axis if like.shape == out.shape else None
    if name in _RESHAPES:
        return _axis_of_shape(like, axis % like.dim(), out)
    if out is not like and memory_of(out) == memory_of(like):
        return _axis_of_view(like, axis % like.dim(), out)
    return int(axis) if like.dim() == out.dim() else None


def _axis_of_product(inputs: list[Tensor], out: Tensor) -> int | None:
    """A weight makes channels: rows where it stands on the left, else columns."""
    if len(inputs) != 2 or out.dim() < 2 or not any(map(is_live, inputs)):
        return None
    if all(map(is_live, inputs)):
        return _NO_CHANNELS
    (x,) = filter(is_live, inputs)
    made = -1 if x is inputs[0] else -2
    axis = getattr(x, "_ts_axis", None)
    if axis is None or axis % x.dim() == (made % x.dim()):
        return made
    return axis if x.dim() == out.dim() else None  # the weight mixes something else, such as nodes


def _axis_of_einsum(text: str, inputs: list[Tensor], out: Tensor) -> int | None:
    """The one axis of the result that the weights give, and the values do not."""
    given, _, result = text.replace(" ", "").partition("->")
    letters = given.split(",")
    if "." in text or len(letters) != len(inputs) or len(result) != out.dim():
        return None
    if len(inputs) > 1 and all(map(is_live, inputs)):
        return _NO_CHANNELS
    live = {one for x, names in zip(inputs, letters, strict=True) if is_live(x) for one in names}
    made = [result.index(one) for one in result if one not in live]
    return _from_end(made[0], out) if len(made) == 1 else None


def _axis_of_shape(x: Tensor, axis: int, out: Tensor) -> int | None:
    """An axis whose size, and what stands before it, stay in a reshape."""
    for j in range(out.dim()):
        same = out.shape[j] == x.shape[axis]
        if same and math.prod(out.shape[:j]) == math.prod(x.shape[:axis]):
            return _from_end(j, out)
    return None


def _axis_of_view(x: Tensor, axis: int, out: Tensor) -> int | None:
    """Where an axis is in a view: it keeps its step in memory."""
    found = [j for j in range(out.dim()) if out.stride(j) == x.stride(axis) and out.shape[j] > 1]
    return _from_end(found[0], out) if len(found) == 1 else None


def _from_end(axis: int, x: Tensor) -> int:
    """The last axis is -1: so it is for inputs with other numbers of axes."""
    return -1 if axis == x.dim() - 1 else axis
