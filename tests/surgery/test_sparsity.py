"""Exact zeros, counted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import (
    activation_sparsity,
    bake,
    convert,
    fold_targets,
    match_targets,
    swap_targets,
)
from transfer_surgery.units import gated_activations

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """A module and a functional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 3)
        self.act, self.norm = nn.ReLU(), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.last(F.gelu(self.second(self.norm(self.act(self.first(x))))))

    def zeros(self, x):
        """Of both activations."""
        first = self.act(self.first(x))
        return (first == 0).sum().item(), (F.gelu(self.second(self.norm(first))) == 0).sum().item()


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    model.norm.eval()
    model.second.bias.data[:3] = -100.0  # GELU is exactly zero there
    return model


def counts(found):
    return {row.path: (row.zeros, row.elements) for row in found}


def test_zeros_are_those_of_a_direct_computation():
    model = network()
    found = activation_sparsity(model, X.split(32))
    first, second = model.zeros(X)
    assert counts(found) == {"act": (first, 96 * 8), "gelu_0": (second, 96 * 16)}
    assert second == 96 * 3
    assert found.total.zeros == first + second
    assert found.total.share == pytest.approx((first + second) / (96 * 24))


def test_paths_and_counts_are_the_same_before_and_after_conversion_and_baking():
    model = network()
    before = activation_sparsity(model, [X])
    assert activation_sparsity(convert(model, "sin", example_input=X), [X]) == before
    assert activation_sparsity(bake(model), [X]) == before


@pytest.mark.parametrize("kept", [0, 8, 16])
def test_a_baked_network_has_the_zeros_of_its_gated_one(kept):
    model = convert(network(), "relu", source="gelu", example_input=X)
    ((_, unit),) = gated_activations(model)
    unit.log_alpha.data.copy_(torch.where(torch.arange(16) < kept, 8.0, -8.0))
    gated = activation_sparsity(model, [X])
    baked = activation_sparsity(bake(model), [X])
    assert counts(gated).items() <= counts(baked).items()
    assert counts(baked).keys() == {"act", "gelu_0"}  # baked: also what was not converted


def test_an_offset_hides_zeros_until_it_is_folded():
    model = convert(network(), "relu", source="gelu", example_input=X)
    match_targets(model, [X])
    bake(swap_targets(model))
    assert counts(activation_sparsity(model, [X]))["gelu_0"] == (96 * 3, 96 * 16)  # always zero
    assert fold_targets(model, X).rows[0].left == ""
    zeros, _ = counts(activation_sparsity(model, [X]))["gelu_0"]
    assert zeros > 96 * 4


def test_a_network_of_fitted_targets_alone_is_counted_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    match_targets(convert(model, "relu"), [X])
    bake(swap_targets(model))
    assert counts(activation_sparsity(model, [X])) == {"1": (0, 96 * 8)}


def test_an_activation_that_works_in_place_is_counted_before_it_is_overwritten():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Threshold(-1.0, 5.0, inplace=True)]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    first = (model[0](X) <= 0).sum().item()
    for stage in (model, convert(model, "sin"), bake(model)):
        assert counts(activation_sparsity(stage, [X]))["1"] == (first, 96 * 8)


def test_the_model_is_left_as_it_was():
    model = convert(network().train(), "relu", example_input=X)
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        activation_sparsity(model, [X, torch.randn(2, 5)])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    activation_sparsity(model, [X])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_site_that_does_not_run_has_no_share():
    model = convert(network(), "relu", example_input=X)
    model.register_module("aside", copy.deepcopy(model.gelu_0))
    found = activation_sparsity(model, [X])
    assert {row.path: row.share for row in found}["aside"] is None
    assert "not run" in str(found)
    assert str(found).splitlines()[-1].startswith("total")


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no activation"):
        activation_sparsity(nn.Linear(4, 2), [X])
    with pytest.raises(ValueError, match="there are none"):
        activation_sparsity(network(), [])
