"""Modules of registered activations: sites of `convert`, and what `bake` leaves at a site."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import bake, convert, find_activations, get_activation, register_activation
from transfer_surgery.activations import ActivationModule, registered_activations

X = torch.linspace(-3, 3, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5)


@pytest.fixture
def several_calls(own_registry):
    @register_activation("several_calls")
    def several_calls(x, width=1.0):
        return torch.relu(x) * torch.sigmoid(x / width) - F.silu(x)


# clamp is a bound of something, not hidden, until the user says otherwise.
NO_SOURCE = {"clamp"} | {n for n in registered_activations() if get_activation(n).operands}
REGISTERED = [name for name in registered_activations() if name not in NO_SOURCE]
WITH_PARAMETERS = ["snake(a=0.5)", "leaky_relu(negative_slope=0.2)", "several_calls(width=2)"]
SOURCES = [*REGISTERED, *WITH_PARAMETERS, "several_calls"]


def _around(name):
    return nn.Sequential(nn.Conv2d(4, 3, 1), ActivationModule(name), nn.Conv2d(3, 2, 1)).eval()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.usefixtures("several_calls")
@torch.no_grad()
def test_a_module_of_any_registered_activation_is_one_site_of_that_very_activation(name):
    network = _around(name)
    before = network(X)
    (site,) = find_activations(network, X)
    assert (site.path, site.source, site.role) == ("1", get_activation(name), "hidden")
    assert site.way == "child"
    target = "cos" if name == "sin" else "sin"
    assert torch.equal(convert(network, target, example_input=X)(X), before)
    network[1].log_alpha.fill_(-8.0)
    expected = network[2](get_activation(target)(network[0](X)))
    assert torch.equal(bake(network)(X), expected)


@torch.no_grad()
def test_baked_sites_are_torchs_own_modules_where_torch_has_one():
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.SiLU(), nn.Conv2d(3, 2, 1), nn.GELU())
    convert(model, "hardtanh(min_val=0.0, max_val=3.0)", example_input=X)
    model[1].log_alpha.fill_(-8.0)
    bake(model)
    assert str(model[1]) == "Hardtanh(min_val=0.0, max_val=3.0)"
    assert type(model[3]) is nn.GELU
