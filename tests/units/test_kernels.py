import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from transfer_surgery import get_activation
from transfer_surgery.activations import Activation
from transfer_surgery.units import gated
from transfer_surgery.units.kernels import gated_value

INF = math.inf

FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sin": np.sin,
    "square": lambda x: x * x,
    "resin": lambda x: np.sin(np.clip(x, -np.pi / 2, np.pi / 2)),
}

names = st.sampled_from(sorted(FORMULAS))
gate_values = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
numbers = st.floats(-50, 50, width=32)


def activations(source: str, target: str) -> tuple[Activation, Activation]:
    return get_activation(source), get_activation(target)


def reference(x: Tensor, z: Tensor, source: str, target: str) -> Tensor:
    """Eq. 1 in float64 numpy, choosing at the ends."""
    x64, z64 = x.double().numpy(), z.double().numpy()
    with np.errstate(all="ignore"):
        s, t = FORMULAS[source](x64), FORMULAS[target](x64)
        mixed = z64 * s + (1 - z64) * t
    return torch.from_numpy(np.where(z64 == 1, s, np.where(z64 == 0, t, mixed)))


@pytest.mark.parametrize("kernel", [gated, gated_value])
@given(st.lists(st.tuples(numbers, gate_values), min_size=1, max_size=20), names, names)
def test_values_are_those_of_equation_1(kernel, pairs, source, target):
    x, z = torch.tensor(pairs).unbind(-1)
    y = kernel(x, z, *activations(source, target))
    expected = reference(x, z, source, target)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1), (2, 3, 4, 5)])
def test_gates_broadcast_to_the_input_forward_and_backward(shape):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    z = torch.rand(shape, dtype=torch.float64).requires_grad_()
    y = gated(x, z, *activations("relu", "sin"))
    torch.testing.assert_close(y, reference(x, z.detach(), "relu", "sin"))
    grad = torch.randn_like(x)
    y.backward(grad)
    full = grad * (x.clamp_min(0) - x.sin())
    torch.testing.assert_close(z.grad, full.sum_to_size(shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [gated, gated_value])
@pytest.mark.parametrize(
    ("source", "target"), [("tanh", "sin"), ("gelu", "snake"), ("silu", "cos")]
)
def test_gradients_and_second_derivatives_are_those_of_the_value(kernel, source, target):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.2, 0.7, 0.9], dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, z: Tensor) -> Tensor:
        return kernel(x, z, *activations(source, target))

    assert torch.autograd.gradcheck(function, (x, z))
    assert torch.autograd.gradgradcheck(function, (x, z), atol=1e-4)


@pytest.mark.parametrize("kernel", [gated, gated_value])
@pytest.mark.parametrize("z", [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])
def test_exact_gates_give_the_very_bits_of_their_branch(kernel, z):
    x = torch.randn(200, 2, requires_grad=True)
    y = kernel(x, torch.tensor(z), *activations("gelu", "sin"))
    grad = torch.randn_like(x)
    (found,) = torch.autograd.grad(y, x, grad)
    for column, value in enumerate(z):
        if value in (0.0, 1.0):
            alone = get_activation("gelu" if value == 1 else "sin")(x)
            (expected,) = torch.autograd.grad(alone, x, grad)
            assert torch.equal(y[:, column], alone[:, column])
            assert torch.equal(found[:, column], expected[:, column])


@pytest.mark.parametrize("kernel", [gated, gated_value])
@pytest.mark.parametrize("others", [(), (0.5,)], ids=["uniform", "mixed"])
@pytest.mark.parametrize(
    ("gate", "pair", "given", "values", "slopes"),
    [
        (1.0, ("relu", "sin"), [INF, -INF, 2.0], [INF, 0.0, 2.0], [1.0, 0.0, 1.0]),
        (0.0, ("square", "tanh"), [INF, -INF, 1e30], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]),
    ],
)
def test_what_is_nan_or_infinite_does_not_leak_from_the_side_that_a_gate_leaves(
    kernel, others, gate, pair, given, values, slopes
):
    x = torch.tensor(given + [0.3 for _ in others], requires_grad=True)
    y = kernel(x, torch.tensor([gate, gate, gate, *others]), *activations(*pair))
    y.sum().backward()
    assert y[:3].tolist() == values
    assert x.grad[:3].tolist() == slopes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("z", [0.0, 0.4, 1.0])
def test_the_result_and_the_gradient_have_the_dtype_of_the_input(dtype, z):
    x = torch.randn(3, dtype=dtype, requires_grad=True)
    gate = torch.tensor(z, requires_grad=True)
    for kernel in (gated, gated_value):
        y = kernel(x, gate, *activations("relu", "sin"))
        assert y.dtype == dtype
        x_grad, z_grad = torch.autograd.grad(y.sum(), (x, gate))
        assert (x_grad.dtype, z_grad.dtype) == (dtype, torch.float32)


def test_bfloat16_values_are_the_reference_to_rounding():
    x, z = torch.randn(500).bfloat16(), torch.rand(500)
    y = gated(x, z, *activations("gelu", "sin"))
    s, t = torch.nn.functional.gelu(x.double()), x.double().sin()
    scale = s.abs() + t.abs()
    assert ((y - (z * s + (1 - z) * t)).abs() <= 2**-6 * scale).all()


@pytest.mark.parametrize("z", [[1.0, 1.0], [0.0, 0.0]])
def test_exact_gates_get_the_gradient_0_and_straight_through_ones_the_difference(z):
    x = torch.randn(5, 2)
    gate = torch.tensor(z, requires_grad=True)
    gated(x, gate, *activations("relu", "sin")).sum().backward()
    assert gate.grad.tolist() == [0.0, 0.0]
    gate.grad = None
    gated(x, gate, *activations("relu", "sin"), straight_through=True).sum().backward()
    torch.testing.assert_close(gate.grad, (x.relu() - x.sin()).sum(0))


@pytest.mark.parametrize("z", [1.0, 0.5, 0.0])
def test_at_most_the_input_and_the_gates_are_kept_for_backward(z):
    x = torch.randn(100, requires_grad=True)
    gate = torch.tensor(z, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(x, gate, *activations("gelu", "sin"))
    assert {t.data_ptr() for t in kept} <= {x.data_ptr(), gate.data_ptr()}


def test_the_result_is_a_new_tensor_also_for_identity():
    x = torch.randn(4)
    for z in (0.0, 0.5, 1.0):
        y = gated(x, torch.tensor(z), *activations("identity", "sin"))
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("z", [[1.0, 1.0, 1.0], [0.0, 0.3, 1.0]])
def test_vmap_and_per_example_gradients_equal_the_batched_ones(z):
    x, gate = torch.randn(6, 3), torch.tensor(z)
    pair = activations("gelu", "sin")
    expected = gated(x, gate, *pair)
    torch.testing.assert_close(torch.vmap(lambda row: gated(row, gate, *pair))(x), expected)
    gates = gate.expand(6, 3)
    torch.testing.assert_close(torch.vmap(lambda r, g: gated(r, g, *pair))(x, gates), expected)
    each = torch.vmap(torch.func.grad(lambda row: gated(row, gate, *pair).sum()))(x)
    leaf = x.clone().requires_grad_()
    gated(leaf, gate, *pair).sum().backward()
    torch.testing.assert_close(each, leaf.grad)
    per_gate = torch.func.grad(lambda g, row: gated(row, g, *pair).sum())
    found = torch.vmap(per_gate, in_dims=(None, 0))(torch.tensor([0.2, 0.3, 0.4]), x)
    s, t = torch.nn.functional.gelu(x), x.sin()
    torch.testing.assert_close(found, s - t)


compilers = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler"),
    ),
]


def test_make_fx_traces_units_wherever_their_gates_are():
    x = torch.randn(4, 3)
    for z in (torch.zeros(3), torch.ones(3), torch.tensor([0.0, 0.5, 1.0])):
        wanted = gated(x, z, get_activation("relu"), get_activation("sin"))
        traced = make_fx(lambda x, z: gated(x, z, get_activation("relu"), get_activation("sin")))
        assert torch.equal(traced(x, z)(x, z), wanted)


@pytest.mark.parametrize("backend", compilers)
def test_compiled_code_is_one_graph_and_keeps_the_promises_at_the_ends(backend):
    pair = activations("relu", "sin")

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: Tensor, log_alpha: Tensor) -> Tensor:
        z = (log_alpha / 4 + 0.5).clamp(0, 1)
        return gated(x, z, *pair)

    x = torch.tensor([[INF, 0.3, 2.0], [-INF, -0.4, -3.0]], requires_grad=True)
    log_alpha = torch.tensor([9.0, 0.0, -9.0], requires_grad=True)
    y = compiled(x, log_alpha)
    y.sum().backward()
    expected = reference(x.detach(), torch.tensor([1.0, 0.5, 0.0]), "relu", "sin").float()
    torch.testing.assert_close(y, expected)
    middle = 0.5 * (x[:, 1] > 0) + 0.5 * x[:, 1].cos()
    slopes = torch.stack([torch.tensor([1.0, 0.0]), middle, x[:, 2].cos()], dim=1)
    torch.testing.assert_close(x.grad, slopes)
    difference = (x[:, 1].relu() - x[:, 1].sin()).sum().item() / 4
    torch.testing.assert_close(log_alpha.grad, torch.tensor([0.0, difference, 0.0]))
