"""recompute_activations: peak memory of the original network, though units need their input too.

A ReLU in place leaves one tensor behind, which the next convolution keeps as well. A gated unit
reads its input in backward: a second one. While a model with this switched on runs forward, its
tensors that autograd saves are replaced by remakes, functions that make them again from others that
are saved anyway: the input of a unit behind a batch norm from the input of the norm, the output of
any other unit from the unit's input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.units.kernels import values_readable

Remake = Callable[[], Tensor]
_current: ContextVar[tuple[_Remakes, ...]] = ContextVar("remakes", default=())


def recompute_activations(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Switch recomputation on or off for a converted model.

    It costs an element-wise pass per site in backward. Gradients are those without it, to rounding:
    the output of a batch norm is computed again from the statistics that it kept. A norm whose
    ``bias`` is frozen is left alone. Recomputation has no effect on compiled models, where
    the compiler decides what to keep. `torch.func` transforms do not run with it.

    Args:
        model: a converted model or a part of it: the module that you call, not a wrapper around it.
        enabled: on or off.

    Returns:
        The same model object.

    Examples:
        >>> from transfer_surgery import convert
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        >>> x = torch.randn(2, 1, 8, 8)
        >>> model = recompute_activations(convert(model, example_input=x))
        >>> model(x).sum().backward()
    """
    check_arguments(recompute_activations, locals())
    pre, post = model._forward_pre_hooks, model._forward_hooks
    for hooks, function in ((pre, _begin), (post, _end)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if enabled:
        model.register_forward_pre_hook(_begin, prepend=True)
        model.register_forward_hook(_end, always_call=True)
    return model


def with_remakes(function: Callable[..., Tensor], x: Tensor, z: Tensor) -> Tensor:
    """``function(x, z)`` of a unit; with recomputation its input or its result gets a remake.

    Args:
        function: the gated activation; it draws no random numbers.
        x: the unit's input.
        z: its gates.
    """
    running = () if torch.compiler.is_compiling() else _current.get()
    # Other kinds of tensors (sharded ones) have no place in memory by which to know them.
    if not (running and torch.is_grad_enabled() and type(x) is Tensor):
        return function(x, z)
    remakes, of_input = running[-1], _output_of_norm(x)
    if of_input is not None:
        remakes.know(x, of_input)
    y = function(x, z)
    if of_input is None and not _at_source(z):
        given = x.detach(), z.detach()
        remakes.know(y, lambda: function(*given))
    return y


def _at_source(z: Tensor) -> bool:
    """Whether all gates are known to be 1; a ReLU then keeps its output instead of its input."""
    return values_readable(z) and bool((z == 1).all())


def _begin(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    remakes = _Remakes()
    remakes.__enter__()
    _current.set((*_current.get(), remakes))


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    *outer, remakes = _current.get()
    _current.set(tuple(outer))
    remakes.__exit__()


class _Remakes(torch.autograd.graph.saved_tensors_hooks):
    """How to make tensors again that autograd is about to save in one run of a model."""

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        # Autograd hands over aliases of the tensors: they are known by their place in memory,
        # which is theirs while the tensor lives.
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, Remake]] = {}

    def know(self, tensor: Tensor, remake: Remake) -> None:
        """Save this remake instead of the tensor."""
        self._known[_place(tensor)] = weakref.ref(tensor), tensor._version, remake

    def _pack(self, saved: Tensor) -> Remake:
        original, version, remake = self._known.get(_place(saved), (None, 0, None))
        tensor = None if original is None else original()
        if tensor is not None and tensor._version == version and remake is not None:
            shape = saved.shape
            if shape == tensor.shape and saved.stride() == tensor.stride():
                return remake
            if saved.is_contiguous() and tensor.is_contiguous():  # linear layers flatten tokens
                return lambda: remake().view(shape)
        return partial(_unchanged, saved, saved._version)


def _unchanged(saved: Tensor, version: int) -> Tensor:
    """With hooks autograd does not look itself whether a tensor was changed in place."""
    if saved._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: shape {tuple(saved.shape)}, version {saved._version} instead of {version}."
        )
    return saved


def _unpack(remake: Remake) -> Tensor:
    with torch.no_grad():
        return remake()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.numel()


def _output_of_norm(x: Tensor) -> Remake | None:
    """How to make the output of a batch norm again from what the norm itself keeps."""
    node: Any = x.grad_fn
    kind = "" if node is None else node.name()
    if not kind.endswith("BatchNormBackward0"):
        return None
    bias = _parameter(node.next_functions[2][0])
    if bias is None and node._saved_weight is not None:
        return None  # frozen: nothing in the graph has it
    given, weight = node._saved_input, node._saved_weight
    if node._saved_training:
        mean, scale = node._saved_result1, node._saved_result2
    else:
        eps = getattr(node, "_saved_eps", None) or node._saved_epsilon
        mean, scale = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
    like = x.dtype

    def remake() -> Tensor:
        shape = [1, -1, *[1] * (given.dim() - 2)]
        factor = scale if weight is None else scale * weight
        y: Tensor = (given - mean.view(shape)) * factor.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(like)

    return remake


def _parameter(node: Any) -> Tensor | None:
    parameter: Tensor | None = getattr(node, "variable", None)
    return parameter
