"""Sites swapped one at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    TransferSchedule,
    convert,
    match_targets,
    sensitivity,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations

X = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def test_a_row_is_what_the_swap_of_that_site_alone_does():
    model, original = convert(network(), example_input=X), network()
    match_targets(model, [X])
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, X.split(100), logits=True)
    assert_same_bits(model, before)
    assert model.training
    assert [row.divergence for row in found] == sorted(row.divergence for row in found)
    assert {row.path for row in found} == {"1", "3", "5"}
    wanted = original(X)
    for row in found:
        one = swap_targets(copy.deepcopy(model), include=row.path).eval()(X)
        kl = F.kl_div(
            one.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        assert row.divergence == pytest.approx(kl.item(), rel=1e-3)
        assert row.changed == pytest.approx((one.argmax(1) != wanted.argmax(1)).float().mean())
        deviation = (wanted - wanted.mean(0)).square().sum()
        error = ((one - wanted).square().sum() / deviation).item()
        assert row.errors == {"output": pytest.approx(error, rel=1e-4)}


def test_sites_that_were_transferred_already_count_as_original():
    model = convert(network(), example_input=X)
    rows = sensitivity(model, [X]).rows
    assert sensitivity(swap_targets(model), [X]).rows == rows


def test_rounding_puts_no_divergence_below_zero():
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(1e-4)
    convert(model, example_input=X)
    for x in X.split(1):
        assert min(row.divergence for row in sensitivity(model, [x], logits=True)) >= 0
    for x in X.split(50):
        found = match_targets(copy.deepcopy(model), [x], logits=True)
        assert min(row.divergence for row in found) >= 0


def test_the_cheapest_site_is_transferred_first():
    model = convert(network(), example_input=X)
    match_targets(model, [X])
    order = sensitivity(model, [X]).order
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(30, order=order))
    gone: list[str] = []
    for _ in range(30):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for path, unit in gated_activations(model):
            if path not in gone and (unit.gate.predict() == 0).all():
                gone.append(path)
    assert tuple(gone) == order


class Potential(nn.Module):
    """An energy, and the forces by a gradient inside of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_()
        energy = self.net(x).sum(1)
        return {
            "energy": energy,
            "forces": -torch.autograd.grad(energy.sum(), x, create_graph=True)[0],
        }


def test_networks_that_take_gradients_inside_are_compared():
    rows = sensitivity(convert(Potential(), example_input=X), [X]).rows
    assert all(row.errors.keys() == {"energy", "forces"} for row in rows)
    assert all(error > 0 for row in rows for error in row.errors.values())


class Masked(nn.Module):
    """A third class that is never the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)


def test_a_class_that_is_masked_adds_nothing_to_the_divergence():
    model = convert(Masked(), example_input=X)
    wanted = network()(X)[:, :2].log_softmax(1)
    for row in sensitivity(model, [X], logits=True):
        one = swap_targets(copy.deepcopy(model), include=row.path).eval()(X)[:, :2].log_softmax(1)
        kl = F.kl_div(one, wanted, log_target=True, reduction="batchmean")
        assert row.divergence == pytest.approx(kl.item(), rel=1e-3)
