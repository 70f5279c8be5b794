"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (see conftest)."""

import math
from itertools import cycle, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfer_surgery import get_activation
from transfer_surgery.units import spread

pytest.importorskip("triton")
from transfer_surgery.units.kernels.triton.layout import layout_of, tiles_of
from transfer_surgery.units.kernels.triton.op import gated_triton, supports

NUMPY = "ignore:(overflow|invalid value) encountered:RuntimeWarning"  # the interpreter's, at inf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
CONSTANTS = (2 / 3, -0.1, 1.1)
# The interpreter cuts float32 off to bfloat16, where a GPU rounds.
EPSILON = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7,
    torch.float16: 2**-10,
}
RELU, SIN = get_activation("relu"), get_activation("sin")

MEMORY = {
    "channels first": ((2, 5, 6, 7), 1, torch.contiguous_format),
    "channels first, long rows": ((2, 3, 30, 31), 1, torch.contiguous_format),
    "channels last": ((2, 5, 6, 7), 1, torch.channels_last),
    "tokens": ((3, 7, 10), -1, torch.contiguous_format),
    "channels in the middle": ((2, 3, 5, 4), 2, torch.contiguous_format),
    "features, several blocks of gates": ((17, 150), 1, torch.contiguous_format),
    "one example": ((1, 3, 4, 4), 1, torch.contiguous_format),
    "volumes, channels last": ((2, 3, 2, 3, 4), 1, torch.channels_last_3d),
}


def reference(x, gates, noise, *parameters, pair, granularity, axis, constants):
    """Eq. 15 or 16, then Eq. 1, as written there."""
    z = gates
    if constants is not None:
        temperature, xi, zeta = constants
        if noise is not None:
            z = (z + torch.log(noise / (1 - noise))) / temperature
        z = (z.sigmoid() * (zeta - xi) + xi).clamp(0, 1)
    z, *parameters = (
        None if t is None else spread(t, x, granularity, axis) for t in (z, *parameters)
    )
    a, w, c, b = (d if p is None else p for p, d in zip(parameters, (1, 1, 0, 0), strict=True))
    return z * pair[0](x) + (1 - z) * (a * pair[1](w * x + c) + b)


def gate_shape(shape, granularity, axis):
    return {"layer": (1,), "channel": (shape[axis],), "neuron": shape[1:]}[granularity]


def arguments(shape, axis, memory, granularity, noise, matched=True, dtype=torch.float32):
    """Leaves ``x, gates, eps, a, w, c, b``; `noise` none, batch, example, or the same with z."""
    kind, _, draw = noise.rpartition(" ")
    gates = gate_shape(shape, granularity, axis)
    several = (shape[0], *gates) if draw == "example" else gates
    x = (2 * torch.randn(shape, device=DEVICE)).to(dtype)
    x = x.contiguous(memory_format=memory)
    eps = None
    if kind == "z":
        first = torch.rand(several, device=DEVICE)
    else:
        first = torch.randn(gates, device=DEVICE)
        eps = None if draw == "none" else torch.rand(several, device=DEVICE)
    parameters = [torch.randn(gates, device=DEVICE) if matched else None for _ in range(4)]
    leaves = [x, first, eps, *parameters]
    for leaf in leaves:
        if leaf is not None and leaf is not eps:
            leaf.requires_grad_()
    return leaves, None if kind == "z" else CONSTANTS


def compare(leaves, constants, granularity, axis, pair=(RELU, SIN)):
    """Values and gradients against float64."""
    options = {"granularity": granularity, "channel_axis": axis, "constants": constants}
    given = (*leaves[:3], *pair)
    assert supports(*given, parameters=tuple(leaves[3:]), **options)
    y = gated_triton(*given, parameters=tuple(leaves[3:]), **options)
    x = leaves[0]
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    wide = [None if t is None else t.detach().double() for t in leaves]
    wanted = [i for i, t in enumerate(leaves) if t is not None and i != 2]
    for i in wanted:
        wide[i].requires_grad_()
    expected = reference(*wide, pair=pair, granularity=granularity, axis=axis, constants=constants)
    eps = EPSILON[x.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=3e-6)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [leaves[i] for i in wanted], grad)
    right = torch.autograd.grad(expected, [wide[i] for i in wanted], grad.double())
    for i, one, other in zip(wanted, found, right, strict=True):
        assert one.dtype == leaves[i].dtype
        rtol, atol = (eps, 1e-5) if i == 0 else (1e-4, 1e-4)
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol, msg=f"argument {i}")


GRANULARITIES = ("layer", "channel", "neuron")
NOISES = ("none", "batch", "example", "z batch", "z example")


@pytest.mark.parametrize(
    ("memory", "granularity", "noise"),
    [(m, g, n) for m, (g, n) in zip(cycle(MEMORY), product(GRANULARITIES, NOISES), strict=False)],
)
def test_values_and_all_gradients_are_those_of_float64(memory, granularity, noise):
    shape, axis, memory_format = MEMORY[memory]
    leaves, constants = arguments(shape, axis, memory_format, granularity, noise)
    compare(leaves, constants, granularity, axis)


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(-4, 3),
    st.sampled_from(["layer", "channel", "neuron"]),
    st.sampled_from(["none", "batch", "example"]),
    st.booleans(),
)
def test_any_shape_and_axis_will_do(shape, axis, granularity, noise, matched):
    axis %= len(shape)
    if granularity == "channel" and axis == 0:
        noise = "none"  # the axis of the examples is taken
    plain = torch.contiguous_format
    leaves, constants = arguments(tuple(shape), axis, plain, granularity, noise, matched)
    compare(leaves, constants, granularity, axis)


@pytest.mark.parametrize(
    ("dtype", "memory", "matched"),
    [
        (torch.float32, "channels first", False),
        (torch.bfloat16, "channels last", True),
        (torch.float16, "channels first", True),
    ],
)
def test_each_dtype_is_right_to_its_rounding(memory, dtype, matched):
    shape, axis, memory_format = MEMORY[memory]
    leaves, constants = arguments(shape, axis, memory_format, "channel", "batch", matched, dtype)
    pair = get_activation("gelu"), SIN
    compare(leaves, constants, "channel", axis, pair)


@pytest.mark.parametrize("folded", ["a", "b", "wc"])
def test_parameters_may_be_folded_away_and_frozen(folded):
    leaves, constants = arguments((2, 3, 4, 4), 1, torch.contiguous_format, "channel", "batch")
    for i, name in enumerate("awcb"):
        leaves[3 + i] = None if name in folded else leaves[3 + i]
    compare(leaves, constants, "channel", 1)
    x, gates, eps, *parameters = leaves
    for parameter in parameters[1:]:
        if parameter is not None:
            parameter.requires_grad_(False)
    options = {"granularity": "channel", "constants": constants, "parameters": tuple(parameters)}
    gated_triton(x, gates, eps, RELU, SIN, **options).sum().backward()
    assert all(
        (p is None or p.grad is not None) == (i == 0) or p is None for i, p in enumerate(parameters)
    )


@pytest.mark.parametrize(
    ("shape", "axis", "order"),
    [
        ((256, 64, 112, 112), 1, "first"),
        ((256, 2048, 7, 7), 1, "first"),
        ((256, 256, 56, 56), 1, "last"),
        ((512, 197, 3072), 2, "first"),
    ],
)
def test_partial_sums_of_big_tensors_take_a_64th_of_their_memory(shape, axis, order):
    memory = torch.channels_last if order == "last" else torch.contiguous_format
    x = torch.empty(shape, device="meta").contiguous(memory_format=memory)
    for granularity, itemsize, sums in product(GRANULARITIES, (2, 4), (1, 5)):
        layout = layout_of(x, granularity, axis)
        tiles = tiles_of(layout, itemsize, sums=sums)
        covered = tiles.tiles_per_program * tiles.block_count
        if layout.outer * layout.count >= 2 * covered:  # else one program sums all there is
            padded = 1.5  # a tile may reach over the end of its row
            assert 64 * tiles.rows * layout.gates * 4 * sums <= padded * x.numel() * itemsize


def many(gates: list[float], rows: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, len(gates), 2, device=DEVICE)
    return x, torch.tensor(gates, device=DEVICE)


@pytest.mark.filterwarnings(NUMPY)
@pytest.mark.parametrize("gates", [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0, 0.5]])
def test_where_a_gate_is_exact_the_other_branch_contributes_nothing(gates):
    x, z = many(gates)
    x[0, :2, 0], x[1, :2, 0], x[2, :2, 0] = INF, -INF, 1e30
    x.requires_grad_()
    z.requires_grad_()
    # A source that overflows (square), a target that is nan (sine) at infinity.
    for pair, place, value in (
        ((RELU, SIN), 1.0, [INF, 0.0, 1e30]),
        ((get_activation("square"), get_activation("tanh")), 0.0, [1.0, -1.0, 1.0]),
    ):
        y = gated_triton(x, z, None, *pair, granularity="channel")
        grad_x, grad_z = torch.autograd.grad(y, (x, z), torch.ones_like(y))
        slope = [1.0, 0.0, 1.0] if place else [0.0, 0.0, 0.0]
        for gate, number in enumerate(gates):
            if number == place:
                torch.testing.assert_close(y[:3, gate, 0].tolist(), value)
                assert grad_x[:3, gate, 0].tolist() == slope
            if number in (0.0, 1.0):
                assert grad_z[gate] == 0


def test_exact_gates_give_the_very_bits_of_a_relu_and_its_gradient():
    x, z = many([1.0, 1.0, 1.0, 0.4])
    x.requires_grad_()
    for some in (z, z[:3]):
        y = gated_triton(x[:, : len(some)], some, None, RELU, SIN, granularity="channel")
        (grad,) = torch.autograd.grad(y[:, :3].sum(), x)
        assert torch.equal(y[:, :3], x[:, :3].relu())
        assert torch.equal(grad[:, :3], (x[:, :3] > 0).float())


@pytest.mark.parametrize("start", [20.0, -20.0])
def test_gates_far_out_are_exact_and_get_no_gradient(start):
    x, _ = many([0.0] * 3)
    log_alpha = torch.full((3,), start, device=DEVICE, requires_grad=True)
    eps = torch.rand(3, device=DEVICE)
    y = gated_triton(x, log_alpha, eps, RELU, SIN, granularity="channel", constants=CONSTANTS)
    assert torch.equal(y, x.relu()) if start > 0 else torch.allclose(y, x.sin(), atol=1e-6)
    y.sum().backward()
    assert log_alpha.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
        lambda g: g.contiguous(memory_format=torch.channels_last),
        lambda g: g[:1, :1, :1, :1].expand(g.shape),
        lambda g: torch.stack([g, g], -1)[..., 0],
    ],
    ids=["transposed", "channels last", "expanded", "strided"],
)
def test_a_gradient_may_come_in_any_memory(change):
    x = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True)
    z = torch.rand(3, device=DEVICE, requires_grad=True)
    y = gated_triton(x, z, None, RELU, SIN, granularity="channel")
    grad = change(torch.randn_like(y))
    found = torch.autograd.grad(y, (x, z), grad, retain_graph=True)
    plain = torch.autograd.grad(y, (x, z), grad.clone(memory_format=torch.contiguous_format))
    assert all(map(torch.equal, found, plain))


def test_every_call_gives_the_same_bits():
    leaves, constants = arguments((3, 5, 9, 9), 1, torch.contiguous_format, "channel", "batch")
    options = {"granularity": "channel", "constants": constants, "parameters": tuple(leaves[3:])}
    wanted = [t for i, t in enumerate(leaves) if i != 2]

    def run():
        y = gated_triton(*leaves[:3], RELU, SIN, **options)
        return y, *torch.autograd.grad(y.square().sum(), wanted)

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_a_tensor_without_elements_passes(shape):
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    z = torch.full((3,), 0.5, device=DEVICE, requires_grad=True)
    y = gated_triton(x, z, None, RELU, SIN, granularity="channel")
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert z.grad.tolist() == [0.0, 0.0, 0.0]


def test_only_the_input_and_small_tensors_are_kept_for_backward():
    leaves, constants = arguments((4, 3, 8, 8), 1, torch.contiguous_format, "channel", "batch")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_triton(
            *leaves[:3],
            RELU,
            SIN,
            granularity="channel",
            constants=constants,
            parameters=tuple(leaves[3:]),
        )
    assert [t.numel() for t in kept if t.numel() > 3] == [leaves[0].numel()]


def test_what_is_not_supported_is_said_beforehand():
    x, z = torch.randn(2, 3, 4, 4, device=DEVICE), torch.rand(3, device=DEVICE)

    def can(x, z, source="relu", target="sin", granularity="channel", **options):
        pair = get_activation(source), get_activation(target)
        return supports(x, z, None, *pair, granularity=granularity, **options)

    seen = []
    assert can(x, z)
    assert not can(x.double(), z)
    assert not can(x, z.bfloat16())
    assert not can(x[..., ::2], z)
    assert not can(x.transpose(0, 1), z[:2])
    assert not can(x, z, source="prelu")
    assert not can(x, z, source="tlu")
    assert not can(x, z[:2])
    assert not can(x, z, parameters=(z[:2], None, None, None))
    assert not can(x, z.expand(2, 3), constants=CONSTANTS)
    last = x.contiguous(memory_format=torch.channels_last)
    assert can(last, z)
    assert not can(last, z[:2].repeat(2), channel_axis=2)
    for transform in (
        torch.vmap,
        torch.func.grad,
    ):  # torch.func differentiates no operator in Python
        transform(lambda x: seen.append(can(x, z)) or x.sum())(x)
    assert seen == [False, False]
