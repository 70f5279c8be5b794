"""The Triton kernels as an operator of torch, with shapes for tracing, gradients and vmap.

``torch.ops.transfer_surgery.gated`` is one node for torch.compile and torch.export; its gradient is
one more, ``gated_backward``. A gradient of that gradient runs `_plain`, the same formula in
differentiable tensor code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.units.granularity import spread
from transfer_surgery.units.kernels.affine import Affine
from transfer_surgery.units.kernels.eager import gated_plain
from transfer_surgery.units.kernels.triton.functions import in_triton
from transfer_surgery.units.kernels.triton.launch import (
    INTERPRETED,
    Call,
    dense,
    gate_count,
    launch_backward,
    launch_forward,
    sums_shape,
)
from transfer_surgery.units.kernels.triton.layout import layout_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    x: Tensor,
    gates: Tensor,
    noise: Tensor | None,
    source: Activation,
    target: Activation,
    *,
    granularity: str,
    channel_axis: int = 1,
    constants: tuple[float, float, float] | None = None,
    parameters: Affine | None = None,
) -> bool:
    """Whether `gated_triton` takes these arguments, which are the same; cheap."""
    small = [gates, *(t for t in (noise, *(parameters or ())) if t is not None)]
    tensors = (x, *small)
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors) or any(
        torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
    ):
        return False
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        return False
    if x.dtype not in _DTYPES or any(
        t.dtype != torch.float32 or t.device != x.device for t in small
    ):
        return False
    if in_triton(source) is None or in_triton(target) is None or x.dim() == 0:
        return False
    count = gate_count(x, granularity, channel_axis)
    either = (count, count * x.shape[0])
    if gates.numel() not in (either if constants is None else either[:1]):
        return False
    if noise is not None and noise.numel() not in either:
        return False
    if any(p is not None and p.numel() != count for p in parameters or ()):
        return False
    per_example = max(t.numel() for t in small) > count
    return layout_of(x, granularity, channel_axis, per_example) is not None


def gated_triton(
    x: Tensor,
    gates: Tensor,
    noise: Tensor | None,
    source: Activation,
    target: Activation,
    *,
    granularity: str,
    channel_axis: int = 1,
    constants: tuple[float, float, float] | None = None,
    parameters: Affine | None = None,
) -> Tensor:
    """The gated activation of Eq. 1 in one launch, and one backward; only ``x`` is saved.

    All arithmetic is in float32. Gates that are exactly 0 or 1 get the gradient 0: there are no
    straight-through gradients here.

    Args:
        x: input; float32, bfloat16 or float16.
        gates: ``log_alpha`` where there are `constants`, else ``z`` itself; float32, ``(1,)`` per
            layer, ``(C,)`` per channel, the feature shape per neuron; ``z`` may have the axis of
            examples in front.
        noise: ``eps`` of Eq. 15, of the gates' shape or with the axis of examples in front;
            None: Eq. 16.
        source: activation where the gate is 1.
        target: activation where it is 0.
        granularity: ``"layer"``, ``"channel"`` or ``"neuron"``.
        channel_axis: axis of the channels, used with ``"channel"``.
        constants: ``(temperature, xi, zeta)`` of Eq. 15 and 16.
        parameters: ``(a, w, c, b)`` of a target ``a * target(w*x + c) + b``, each None or float32
            of the gates' shape.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.
    """
    parameters = parameters or (None, None, None, None)
    names = str(source), str(target), granularity
    result: Tensor = _gated(x, gates, noise, *parameters, *names, channel_axis, constants)
    return result


_SCHEMA = (
    "Tensor x, Tensor gates, Tensor? noise, Tensor? a, Tensor? w, Tensor? c, Tensor? b, "
    "str source, str target, str granularity, int channel_axis, float[]? constants"
)


@torch.library.custom_op(
    "transfer_surgery::gated", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor"
)
def _gated(x: Tensor, *arguments: Any) -> Tensor:
    return launch_forward(x, Call(*arguments))


@torch.library.custom_op(
    "transfer_surgery::gated_backward",
    mutates_args=(),
    schema=f"(Tensor grad, bool with_sums, {_SCHEMA}) -> (Tensor, Tensor)",
)
def _gated_backward(
    grad: Tensor, with_sums: bool, x: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    return launch_backward(grad, with_sums, x, Call(*arguments))


@_gated.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(dense(x, Call(*arguments)))


@_gated_backward.register_fake
def _(grad: Tensor, with_sums: bool, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    return torch.empty_like(dense(x, call)), call.gates.new_empty(sums_shape(x, call, with_sums))


def _plain(x: Tensor, *arguments: Any) -> Tensor:
    """The operator in differentiable tensor code, in float32 as well."""
    call = Call(*arguments)
    z = call.gates
    if call.constants is not None:
        temperature, xi, zeta = call.constants
        if call.noise is not None:
            z = (z + call.noise.log() - (-call.noise).log1p()) / temperature
        z = (torch.sigmoid(z) * (zeta - xi) + xi).clamp(0.0, 1.0)
    z = spread(z, x, call.granularity, call.channel_axis)
    a, w, c, b = (
        None if p is None else spread(p, x, call.granularity, call.channel_axis)
        for p in call.parameters
    )
    source, target = get_activation(call.source), get_activation(call.target)
    return gated_plain(x.float(), z, source, target, parameters=(a, w, c, b)).to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.others = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:7]
    none = (None,) * len(ctx.others)
    if torch.is_grad_enabled():  # somebody will differentiate the gradient
        y = _plain(*tensors, *ctx.others)
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return (*(next(found) if need else None for need in needed), *none)
    _, gates, _, *parameters = tensors
    grad_x, sums = _gated_backward(grad, any(needed[1:]), *tensors, *ctx.others)
    rows = iter(sums)
    of_gates = next(rows).view(gates.shape) if any(needed[1:]) else None
    of_parameters = (
        None if p is None or of_gates is None else next(rows).sum(0).view(p.shape)
        for p in parameters
    )
    return (grad_x, of_gates, None, *of_parameters, *none)


_gated.register_autograd(_backward, setup_context=_setup_context)


@_gated.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """One by one: what is mapped over has layouts of its own; `supports` sends it elsewhere."""
    pairs = list(zip(arguments, in_dims, strict=True))
    calls = (
        _gated(*(value.select(dim, i) if isinstance(dim, int) else value for value, dim in pairs))
        for i in range(info.batch_size)
    )
    return torch.stack(list(calls)), 0
