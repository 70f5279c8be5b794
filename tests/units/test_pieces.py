"""Work done piece by piece in the cache gives what the whole tensor gives."""

import math

import pytest
import torch
from torch import Tensor

from transfer_surgery import get_activation
from transfer_surgery.units import gated
from transfer_surgery.units.kernels import pieces
from transfer_surgery.units.kernels.affine import affine
from transfer_surgery.units.kernels.pieces import by_pieces

PAIR = get_activation("gelu"), get_activation("sin")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_ELEMENTS", 60)


def gradients(function, *leaves: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    grad = torch.cos(torch.arange(y.numel())).view(y.shape).to(y)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def both_ways(monkeypatch, function, *leaves: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    in_pieces = gradients(function, *leaves)
    monkeypatch.setattr(pieces, "_ELEMENTS", 10**9)
    return in_pieces, gradients(function, *leaves)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 4, 1, 1), (1, 4, 3, 5), (7, 4, 1, 1), (4, 1, 1)], ids=str
)
def test_gated_activations_are_the_same_piece_by_piece(monkeypatch, shape, memory_format):
    x = torch.randn(7, 4, 3, 5, dtype=torch.float64).to(memory_format=memory_format)
    z = torch.rand(shape, dtype=torch.float64)
    z.view(-1)[: z.numel() // 2] = 1
    found, expected = both_ways(monkeypatch, lambda x, z: gated(x, z, *PAIR), x, z)
    torch.testing.assert_close(found, expected)
    assert found[0].stride() == x.stride()


def test_matched_targets_are_the_same_piece_by_piece(monkeypatch):
    x = torch.randn(7, 4, 3, 5, dtype=torch.float64)
    z = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64).view(1, 4, 1, 1)
    numbers = [torch.randn(1, 4, 1, 1, dtype=torch.float64) for _ in range(4)]
    mixed = both_ways(
        monkeypatch, lambda x, z, *p: gated(x, z, *PAIR, parameters=p), x, z, *numbers
    )
    torch.testing.assert_close(*mixed)
    alone = both_ways(monkeypatch, lambda x, *p: affine(x, PAIR[1], p), x, *numbers)
    torch.testing.assert_close(*alone)


def test_one_piece_with_infinite_values_leaves_exact_gates_exact():
    x = torch.randn(8, 3, 10)
    x[5, 0] = math.inf
    leaf = x.clone().requires_grad_()
    z = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1)
    pair = get_activation("relu"), get_activation("sin")
    y = gated(leaf, z, *pair)
    y.sum().backward()
    assert torch.equal(y[:, 0], x[:, 0].relu())
    assert torch.equal(y[:, 2], x[:, 2].sin())
    assert torch.equal(leaf.grad[:, 0], (x[:, 0] > 0).float())


def test_only_what_examples_share_is_summed():
    x, shared, own = torch.randn(9, 20), torch.randn(20), torch.randn(9, 1)
    calls = []

    def function(x: Tensor, shared: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(len(x))
        return x + shared, (x * own).sum(0), (x * shared).sum(1, keepdim=True)

    with torch.no_grad():
        found = by_pieces(function, x, shared, own)
    assert calls == [3, 3, 3]
    torch.testing.assert_close(found, list(function(x, shared, own)))


@pytest.mark.parametrize("size", [0, 1])
def test_no_examples_and_a_single_one(size):
    x = torch.randn(size, 100, requires_grad=True)
    gated(x, torch.tensor(0.5), *PAIR).sum().backward()
    assert x.grad.shape == x.shape


def test_second_derivatives_do_not_go_by_pieces():
    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, z: gated(x, z, *PAIR), (x, z), atol=1e-4)
