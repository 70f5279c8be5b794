"""Calls of torch are recognised as the activation that they compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_surgery import get_activation
from transfer_surgery.activations import recognise

X = torch.randn(3)

SPELLINGS = [
    (F.relu, (X,), {}, "relu", False),
    (F.relu, (X, True), {}, "relu", True),
    (F.relu, (X,), {"inplace": True}, "relu", True),
    (F.relu, (), {"input": X}, "relu", False),
    (F.relu_, (X,), {}, "relu", True),
    (torch.relu, (X,), {}, "relu", False),
    (torch.relu_, (X,), {}, "relu", True),
    (Tensor.relu, (X,), {}, "relu", False),
    (Tensor.relu_, (X,), {}, "relu", True),
    (F.relu6, (X, True), {}, "relu6", True),
    (F.leaky_relu, (X,), {}, "leaky_relu", False),
    (F.leaky_relu, (X, 0.2, True), {}, "leaky_relu(negative_slope=0.2)", True),
    (F.leaky_relu, (X,), {"negative_slope": 0.2}, "leaky_relu(negative_slope=0.2)", False),
    (F.leaky_relu_, (X, 0.2), {}, "leaky_relu(negative_slope=0.2)", True),
    (F.elu, (X, 0.5), {"inplace": True}, "elu(alpha=0.5)", True),
    (F.elu_, (X,), {}, "elu", True),
    (F.selu, (X,), {}, "selu", False),
    (torch.selu_, (X,), {}, "selu", True),
    (F.celu, (X, 2.0), {}, "celu(alpha=2.0)", False),
    (F.celu_, (X, 2.0), {}, "celu(alpha=2.0)", True),
    (F.gelu, (X,), {}, "gelu", False),
    (F.gelu, (X,), {"approximate": "tanh"}, "gelu(approximate='tanh')", False),
    (F.silu, (X,), {"inplace": True}, "silu", True),
    (F.mish, (X, True), {}, "mish", True),
    (F.hardswish, (X,), {}, "hardswish", False),
    (F.hardsigmoid, (X, True), {}, "hardsigmoid", True),
    (F.hardtanh, (X, 0.0, 6.0, True), {}, "relu6", True),
    (F.hardtanh, (X, -2.0, 6.0, True), {}, "hardtanh(min_val=-2.0, max_val=6.0)", True),
    (F.hardtanh_, (X,), {}, "hardtanh", True),
    (F.softplus, (X, 2), {}, "softplus(beta=2)", False),
    (Tensor.tanh_, (X,), {}, "tanh", True),
    (F.tanh, (X,), {}, "tanh", False),
    (torch.sigmoid_, (X,), {}, "sigmoid", True),
    (Tensor.sigmoid, (), {"self": X}, "sigmoid", False),
    (torch.special.expit, (X,), {}, "sigmoid", False),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "name", "inplace"), SPELLINGS)
def test_every_spelling_of_a_call_is_recognised(function, args, kwargs, name, inplace):
    call = recognise(function, args, kwargs)
    assert call.activation == get_activation(name)
    assert call.input is X
    assert call.inplace is inplace


@pytest.mark.parametrize("function", [torch.sin, torch.cos, torch.add, print, [], None])
def test_other_calls_are_not_recognised(function):
    assert recognise(function, (X,), {}) is None
