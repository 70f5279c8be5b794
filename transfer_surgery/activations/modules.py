"""Activations as plain modules: what `bake` leaves in a network."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from transfer_surgery.activations.registry import Activation, Value, get_activation


class ActivationModule(nn.Module):
    """A plain module for one activation: what a fully transferred site is baked to.

    Where the activation is plain tensor code, so is the module: it can be traced, also by
    `torch.fx`, scripted and exported.

    Examples:
        >>> import torch
        >>> ActivationModule("sin")(torch.zeros(2))
        tensor([0., 0.])
    """

    def __init__(self, activation: str | Activation) -> None:
        super().__init__()
        self.activation = get_activation(activation)
        self.value = _with_parameters(self.activation)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.value(input)
        return activate(input, self.activation)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "value"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.value = _with_parameters(self.activation)

    def extra_repr(self) -> str:
        return str(self.activation)


class _OperandModule(ActivationModule):
    """An activation that takes further tensors, such as PReLU's slope, from the site."""

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        return activate(input, self.activation, *operands)


def _with_parameters(activation: Activation) -> Value:
    """The activation's value as a function of the input, in a form that torch.jit.script takes."""
    entry = activation._entry
    known = dict(entry.defaults) | dict(activation.parameters)
    value = entry.value
    if not isinstance(value, FunctionType):
        return value
    defaults = tuple(known[name] for name in entry.defaults)
    own: Any = FunctionType(
        value.__code__, value.__globals__, value.__name__, defaults, value.__closure__
    )
    own.__annotations__, own.__module__ = value.__annotations__, value.__module__
    own.__qualname__ = value.__qualname__
    result: Value = own
    return result


def activation_module(activation: str | Activation) -> nn.Module:
    """The plain module of an activation: torch's own where there is one.

    Tools that go by type (quantisation, fusion, attribution) know that one.

    Examples:
        >>> activation_module("leaky_relu(negative_slope=0.2)"), activation_module("sin")
        (LeakyReLU(negative_slope=0.2), ActivationModule(sin))
    """
    activation = get_activation(activation)
    module, parameters = activation._entry.module, dict(activation.parameters)
    if activation.operands:
        return _OperandModule(activation)
    if module is None or "variant" in parameters:  # a variant rounds differently
        return ActivationModule(activation)
    return module(**parameters)


def activate(x: Tensor, activation: Activation, *operands: Tensor) -> Tensor:
    """One torch call, as far as the finder can see, whatever the activation consists of."""
    # Tensors of other kinds, such as the proxies of torch.fx, see what it consists of.
    if torch._C._is_torch_function_mode_enabled():
        result: Tensor = handle_torch_function(activate, (x,), x, activation, *operands)
        return result
    return activation(x, *operands)
