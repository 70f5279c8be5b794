"""The Triton kernels as an operator: what torch's compilers, transforms and checks see of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transfer_surgery import get_activation

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.units.test_triton import CONSTANTS, DEVICE, NUMPY, SIN, arguments, reference
from transfer_surgery.units.kernels.triton.functions import _FUNCTIONS, in_triton
from transfer_surgery.units.kernels.triton.op import gated_triton

VARIANTS = (
    "softplus(beta=2.0, threshold=3.0)",
    "celu(alpha=0.5)",
    "elu(alpha=2.0)",
    "leaky_relu(negative_slope=0.2)",
    "snake(a=2.0)",
    "gelu",
    "gelu(approximate='tanh')",
)


def matched(batch: str = "batch"):
    """Leaves and a function of them: per channel, with a matched target."""
    leaves, constants = arguments((2, 3, 4, 5), 1, torch.contiguous_format, "channel", batch)

    def function(x, log_alpha, eps, *parameters):
        return gated_triton(
            x,
            log_alpha,
            eps,
            get_activation("tanh"),
            SIN,
            granularity="channel",
            constants=constants,
            parameters=parameters,
        )

    return leaves, function


def in_float64(x, log_alpha, eps, *parameters):
    pair = get_activation("tanh"), SIN
    return reference(
        x,
        log_alpha,
        eps,
        *parameters,
        pair=pair,
        granularity="channel",
        axis=1,
        constants=CONSTANTS,
    )


@triton.jit
def _probe(x_ptr, value_ptr, slope_ptr, function: tl.constexpr, numbers: tl.constexpr):
    place = tl.program_id(0) * 512 + tl.arange(0, 512)
    value, slope = function(tl.load(x_ptr + place), numbers)
    tl.store(value_ptr + place, value)
    tl.store(slope_ptr + place, slope)


@pytest.mark.parametrize("name", [*_FUNCTIONS, *VARIANTS])
@pytest.mark.filterwarnings(NUMPY)
def test_each_activation_and_its_derivative_are_those_of_the_registry(name):
    far = torch.logspace(-8, 4, 1024)
    kinks = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 1.5, -1.5]).repeat(64)
    x = torch.cat([torch.linspace(-12, 12, 3 * 512), far, -far, kinks]).to(DEVICE)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    activation = get_activation(name)
    _probe[(len(x) // 512,)](x, value, slope, *in_triton(activation))
    wide = x.double().requires_grad_()
    expected = activation(wide)
    (derivative,) = torch.autograd.grad(expected.sum(), wide)
    for found, right in ((value, expected.detach()), (slope, derivative)):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=2e-6)


@pytest.mark.filterwarnings(NUMPY)
def test_sine_and_cosine_are_precise_for_any_argument():
    x = torch.cat(
        [torch.logspace(3, 38, 1020), torch.tensor([torch.inf, -torch.inf, torch.nan, 0])]
    )
    x = x.to(DEVICE)
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    for sign in (1, -1):
        _probe[(2,)](sign * x, sine, cosine, *in_triton(SIN))
        wide = sign * x.double()
        for found, right in ((sine, wide.sin()), (cosine, wide.cos())):
            torch.testing.assert_close(found.double(), right, rtol=0, atol=4e-7, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of opcheck's own clones
@pytest.mark.parametrize("noise", ["batch", "example", "z batch"])
def test_torch_finds_nothing_wrong_with_the_operator(noise):
    leaves, constants = arguments((2, 3, 4, 5), 1, torch.channels_last, "channel", noise)
    operator = torch.ops.transfer_surgery.gated.default
    torch.library.opcheck(operator, (*leaves, "relu", "sin", "channel", 1, constants))
    backward = torch.ops.transfer_surgery.gated_backward.default
    plain = [None if t is None else t.detach() for t in leaves]
    rest = (*plain, "relu", "sin", "channel", 1, constants)
    torch.library.opcheck(backward, (torch.randn_like(plain[0]), True, *rest))


def test_a_compiler_sees_one_operator_forward_and_one_backward():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def remember(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph)

    leaves, function = matched()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=remember), fullgraph=True)
    wanted = [t for i, t in enumerate(leaves) if i != 2]
    found = torch.autograd.grad(compiled(*leaves).sum(), wanted)
    expected = torch.autograd.grad(function(*leaves).sum(), wanted)
    assert all(map(torch.equal, found, expected))
    forward, backward = graphs
    assert forward == ["transfer_surgery.gated.default"]
    assert sum("transfer_surgery" in target for target in backward) == 1


def test_an_exported_program_keeps_the_operator():
    leaves, function = matched()

    class Network(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x, *leaves[1:])

    leaves = [None if t is None else t.detach() for t in leaves]
    program = torch.export.export(Network(), (leaves[0],))
    assert "transfer_surgery.gated" in str(program.graph)
    assert torch.equal(program.module()(leaves[0]), function(*leaves))


def test_autocast_changes_nothing():
    leaves, function = matched()
    expected = function(*leaves)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(function(*leaves), expected)


def test_second_derivatives_are_those_of_float64():
    leaves, function = matched()
    wide = [t.detach().double().requires_grad_(i != 2) for i, t in enumerate(leaves)]
    grad = torch.randn_like(leaves[0])
    results = []
    for formula, tensors in ((function, leaves), (in_float64, wide)):
        wanted = [t for i, t in enumerate(tensors) if i != 2]
        y = formula(*tensors)
        first = torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True)
        penalty = sum((i + 1) * g.square().sum() for i, g in enumerate(first))
        results.append([g.double() for g in torch.autograd.grad(penalty, wanted)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_vmap_gives_the_batched_values():
    leaves, function = matched()
    x, *rest = (t.detach() for t in leaves)
    each = torch.vmap(lambda row: function(row[None], *rest)[0])(x)
    torch.testing.assert_close(each, function(x, *rest))


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "compile_triton.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
