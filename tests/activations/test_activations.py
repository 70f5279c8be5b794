import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transfer_surgery import convert, get_activation, register_activation
from transfer_surgery.activations import (
    Activation,
    ActivationModule,
    activation_module,
    recognise,
    registered_activations,
)

BUILT_IN = [name for name in registered_activations() if not get_activation(name).operands]

_erf = np.vectorize(math.erf)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _softplus(x: np.ndarray, beta: float = 1.0, threshold: float = 20.0) -> np.ndarray:
    return np.where(beta * x > threshold, x, np.logaddexp(0, beta * x) / beta)


def _elu(x: np.ndarray, alpha: float = 1.0, width: float = 1.0) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) / width))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# The papers' formulas in numpy, and the points where they have a kink.
CLOSED_FORMS = {
    "relu": (lambda x: np.maximum(x, 0), [0]),
    "relu6": (lambda x: np.minimum(np.maximum(x, 0), 6), [0, 6]),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.01 * x), [0]),
    "leaky_relu(negative_slope=0.2)": (lambda x: np.where(x > 0, x, 0.2 * x), [0]),
    "elu": (_elu, []),
    "elu(alpha=0.5)": (lambda x: _elu(x, alpha=0.5), [0]),
    "selu": (
        lambda x: 1.0507009873554805 * _elu(x, alpha=1.6732632423543772),
        [0],
    ),
    "softsign": (lambda x: x / (1 + np.abs(x)), [0]),
    "logsigmoid": (lambda x: -np.log1p(np.exp(-x)), []),
    "tanhshrink": (lambda x: x - np.tanh(x), []),
    "hardshrink": (lambda x: np.where(np.abs(x) > 0.5, x, 0), [-0.5, 0.5]),
    "softshrink": (lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0), [-0.5, 0.5]),
    "celu": (_elu, []),
    "celu(alpha=2.0)": (lambda x: _elu(x, alpha=2.0, width=2.0), []),
    "gelu": (lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))), []),
    "gelu(approximate='tanh')": (_gelu_tanh, []),
    "quick_gelu": (lambda x: x * _sigmoid(1.702 * x), []),
    "silu": (lambda x: x * _sigmoid(x), []),
    "swish": (lambda x: x * _sigmoid(x), []),
    "swish(beta=0.7)": (lambda x: x * _sigmoid(0.7 * x), []),
    "squared_relu": (lambda x: np.maximum(x, 0) ** 2, []),
    "threshold(threshold=0.5, value=-1.0)": (lambda x: np.where(x > 0.5, x, -1.0), [0.5]),
    "clamp(min=-2, max=0.5)": (lambda x: np.clip(x, -2, 0.5), [-2, 0.5]),
    "mish": (lambda x: x * np.tanh(np.logaddexp(0, x)), []),
    "hardswish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, [-3, 3]),
    "hardsigmoid": (lambda x: np.clip(x + 3, 0, 6) / 6, [-3, 3]),
    "hardtanh": (lambda x: np.clip(x, -1, 1), [-1, 1]),
    "hardtanh(min_val=-2.0, max_val=0.5)": (lambda x: np.clip(x, -2, 0.5), [-2, 0.5]),
    "softplus": (_softplus, []),
    "softplus(beta=2.0, threshold=3.0)": (lambda x: _softplus(x, 2.0, 3.0), [1.5]),
    "tanh": (np.tanh, []),
    "sigmoid": (_sigmoid, []),
    "resin": (
        lambda x: np.where(np.abs(x) < np.pi / 2, np.sin(x), np.sign(x)),
        [-np.pi / 2, np.pi / 2],
    ),
    "sin": (np.sin, []),
    "cos": (np.cos, []),
    "snake": (lambda x: x + np.sin(x) ** 2, []),
    "snake(a=0.5)": (lambda x: x + np.sin(0.5 * x) ** 2 / 0.5, []),
    "identity": (lambda x: x, []),
    "square": (lambda x: x**2, []),
    "polynomial": (lambda x: 0.25 * x**2 + 0.5 * x, []),
    "polynomial(degree=5)": (lambda x: 0.25 * x**2 + 0.5 * x, []),  # before it is fitted
}

# What models call. The same kernels must run, forward and backward.
NATIVE = {
    **{name: getattr(F, name) for name in ("relu", "relu6", "leaky_relu", "elu", "selu", "celu")},
    **{name: getattr(F, name) for name in ("gelu", "silu", "mish", "hardswish", "hardsigmoid")},
    **{name: getattr(F, name) for name in ("hardtanh", "softplus")},
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu(negative_slope=0.2)": lambda x: F.leaky_relu(x, 0.2),
    "elu(alpha=0.5)": lambda x: F.elu(x, 0.5),
    "celu(alpha=2.0)": lambda x: F.celu(x, 2.0),
    "gelu(approximate='tanh')": lambda x: F.gelu(x, approximate="tanh"),
    "hardtanh(min_val=-2.0, max_val=0.5)": lambda x: F.hardtanh(x, -2.0, 0.5),
    "softplus(beta=2.0, threshold=3.0)": lambda x: F.softplus(x, 2.0, 3.0),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swish(beta=0.7)": lambda x: x * torch.sigmoid(0.7 * x),
    "squared_relu": lambda x: torch.relu(x) ** 2,
    "clamp(min=-2, max=0.5)": lambda x: x.clamp(-2, 0.5),
}


def slopes(activation: Activation, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(activation(leaf).sum(), leaf)
    return found


def _smooth_points(kinks: list[float]) -> np.ndarray:
    x = np.linspace(-8, 25, 700)
    return x[np.all([np.abs(x - kink) > 1e-3 for kink in kinks], axis=0)] if kinks else x


def test_every_built_in_activation_has_a_closed_form_here():
    assert {name.split("(")[0] for name in CLOSED_FORMS} == set(BUILT_IN)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_values_are_those_of_the_closed_form(name):
    closed_form, kinks = CLOSED_FORMS[name]
    x = np.concatenate([np.linspace(-8, 25, 700), kinks, [0.0]])
    found = get_activation(name)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, closed_form(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_derivatives_are_the_slopes_of_the_closed_form(name):
    closed_form, kinks = CLOSED_FORMS[name]
    x, h = _smooth_points(kinks), 1e-5
    slope = (closed_form(x + h) - closed_form(x - h)) / (2 * h)
    found = slopes(get_activation(name), torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, slope, rtol=1e-7, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NATIVE)
def test_forward_and_backward_are_bit_identical_to_torchs_own(name, dtype):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 6.0, 3.0, -3.0, 1e4, -1e4, math.inf, -math.inf])
    x = torch.cat([torch.randn(500) * 3, special]).to(dtype).requires_grad_()
    grad = torch.randn(len(x)).to(dtype)
    y = NATIVE[name](x)
    (expected,) = torch.autograd.grad(y, x, grad)
    activation = get_activation(name)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(activation(x), y, **exact)
    torch.testing.assert_close(torch.autograd.grad(activation(x), x, grad)[0], expected, **exact)


class _Recorder(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        call = recognise(function, args, kwargs or {})
        if call is not None:
            self.calls.append(call)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NATIVE)
def test_the_module_of_an_activation_is_torchs_own_where_there_is_one_and_is_recognised(name):
    module, x = activation_module(name), torch.randn(500) * 3
    with _Recorder() as recorder:
        found = module(x)
    assert torch.equal(found, get_activation(name)(x))
    own = type(module).__module__.startswith("torch.nn")
    assert own == (name.split("(")[0] not in ("quick_gelu", "swish", "squared_relu", "clamp"))
    if own:
        assert recorder.calls[0].activation == get_activation(name)


def test_a_variant_keeps_its_bits_in_a_module_of_its_own():
    assert type(activation_module("relu(variant='clamp(x, min=0)')")) is ActivationModule


# torch has no second derivative of hardsigmoid either
@pytest.mark.parametrize("name", sorted(CLOSED_FORMS.keys() - {"identity", "hardsigmoid"}))
def test_values_have_second_derivatives(name):
    x = torch.tensor([-2.7, -1.3, -0.4, 0.35, 1.2, 2.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(get_activation(name), (x,))


@given(st.floats(-1e6, 1e6), st.sampled_from(BUILT_IN))
def test_values_and_derivatives_are_finite_at_finite_inputs(x, name):
    point = torch.tensor([x], dtype=torch.float64)
    activation = get_activation(name)
    assert activation(point).isfinite().all()
    assert slopes(activation, point).isfinite().all()


def test_the_input_is_neither_changed_nor_aliased():
    x = torch.randn(20)
    before = x.clone()
    for name in BUILT_IN:
        y = get_activation(name)(x)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), name
    assert torch.equal(x, before)


# --- the registry ------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_registry")
def test_a_third_party_registers_a_function_and_its_derivative_is_autograds():
    def my_op(x: Tensor, width: float = 1.0, inplace: bool = False) -> Tensor:
        return torch.exp(-((x / width) ** 2))

    @register_activation("gaussian", calls={my_op: ("width", "inplace")})
    def gaussian(x: Tensor, width: float = 1.0) -> Tensor:
        return torch.exp(-((x / width) ** 2))

    assert gaussian(torch.zeros(1)) == 1  # the decorator returns the function unchanged
    assert "gaussian" in registered_activations()
    activation = get_activation("gaussian", width=2.0)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    expected = -x / 2 * torch.exp(-(x**2) / 4)
    torch.testing.assert_close(slopes(activation, x), expected)
    assert recognise(my_op, (x, 2.0, True), {}) == (activation, x, True, (), activation)


@pytest.mark.usefixtures("own_registry")
def test_a_parameter_needs_a_default():
    with pytest.raises(ValueError, match="give parameter 'scale' a default value"):

        @register_activation("scaled")
        def scaled(x: Tensor, scale: float) -> Tensor:
            return x * scale

    assert "scaled" not in registered_activations()


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        (register_activation, "relu", "'relu' is already registered; choose another name"),
        (get_activation, "sinus", r"unknown activation 'sinus'\. Known: .*sin.*snake.*Add"),
        (get_activation, "snake(b=1.0)", r"'snake' has no parameter 'b'; it has: a\."),
        (get_activation, "snake(a='x')", r"'snake': a='x' cannot take the place of .* 1\.0\."),
        (get_activation, "snake(a=None)", r"'snake': a=None cannot take the place"),
        (get_activation, "gelu(approximate=1)", r"approximate=1 cannot .* default 'none'\."),
        (get_activation, "sin(a=2)", r"'sin' has no parameter 'a'; it has: none\."),
        *(
            (get_activation, text, "activation")
            for text in ("snake(0.5)", "snake(a=b)", "snake(a=")
        ),
        *((get_activation, text, "activation") for text in ("snake(a=)", "", "a b")),
    ],
)
def test_what_is_no_activation_is_answered_with_the_known_ones(call, argument, message):
    with pytest.raises(ValueError, match=message):
        call(argument)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snake(a='x')", "a='x' cannot take the place of the default"),
        ("gelu(approximate='x')", "cannot be computed: RuntimeError"),
        ("snake(a=0)", r"snake\(a=0\) gives no finite numbers"),
        ("prelu", "prelu takes weight from the site of a network that has it"),
    ],
)
def test_targets_that_cannot_be_computed_are_refused_before_anything_is_changed(text, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    modules = list(model)
    with pytest.raises(ValueError, match=message):
        convert(model, text, example_input=torch.zeros(2, 4))
    assert list(model) == modules


def test_parameters_override_those_of_an_activation():
    assert get_activation(get_activation("snake(a=0.5)"), a=2.0) == get_activation("snake(a=2.0)")


@given(st.sampled_from(sorted(CLOSED_FORMS)), st.floats(allow_nan=False))
def test_text_and_pickle_round_trips_keep_an_activation(name, number):
    activation = get_activation(name)
    first = {key: number for key, value in activation.parameters[:1] if type(value) is float}
    activation = get_activation(activation.name, **first)
    for copy in (get_activation(str(activation)), pickle.loads(pickle.dumps(activation))):
        assert copy == activation
        assert hash(copy) == hash(activation)


def test_text_shows_changed_parameters_only():
    assert str(get_activation("leaky_relu")) == "leaky_relu"
    assert str(get_activation("hardtanh", max_val=6.0)) == "hardtanh(max_val=6.0)"


def test_an_activation_module_computes_its_activation_and_survives_pickle():
    module = pickle.loads(pickle.dumps(ActivationModule("snake(a=0.5)")))
    x = torch.randn(5)
    assert torch.equal(module(x), get_activation("snake", a=0.5)(x))
    assert repr(module) == "ActivationModule(snake(a=0.5))"
    assert not list(module.state_dict())
