"""Layers refitted behind a site: least squares for their weights, and which layers can be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery.matching.layer_refit import LayerFit, can_be_refitted


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Linear(6, 4, bias=False),
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.Conv2d(2, 4, 3, dilation=2, bias=False),
    ],
)
def test_refitted_weights_are_those_of_independent_least_squares(layer):
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(40, 5, 6) if linear else torch.randn(40, 2, 7, 7)
    changed = torch.sin(x) + 0.3 * x + 0.2
    wanted = layer(x).detach()
    fitted = LayerFit(layer, ridge=0.0)
    for a, b in zip(changed.split(16), wanted.split(16), strict=True):
        fitted.add(a, b)
    found = copy.deepcopy(layer)
    found.load_state_dict(fitted.solve())
    best = copy.deepcopy(layer).double()
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=500, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-14)  # fmt: skip

    def loss():
        optimizer.zero_grad()
        value = F.mse_loss(best(changed.double()), wanted.double())
        value.backward()
        return value

    optimizer.step(loss)
    reached = F.mse_loss(found(changed), wanted).item()
    assert reached == pytest.approx(loss().item(), rel=1e-3)
    assert reached < F.mse_loss(layer(changed), wanted).item()


def test_a_strong_ridge_keeps_the_weights():
    layer, x = nn.Linear(6, 4), torch.randn(40, 6)
    fitted = LayerFit(layer, ridge=1e6)
    fitted.add(x.sin(), layer(x).detach())
    torch.testing.assert_close(fitted.solve()["weight"], layer.weight.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_inputs_that_are_0_leave_their_weights_alone(ridge):
    layer = nn.Linear(4, 2)
    for scale in (torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0])):
        x = torch.randn(50, 4) * scale
        fitted = LayerFit(layer, ridge)
        fitted.add(x, layer(x).detach())
        for name, value in fitted.solve().items():
            torch.testing.assert_close(value, getattr(layer, name).detach(), rtol=1e-4, atol=1e-5)


def test_layers_that_compute_something_else_are_left_alone():
    assert can_be_refitted(nn.Conv2d(2, 2, 3))
    assert can_be_refitted(nn.Linear(2, 2))
    assert not can_be_refitted(nn.Conv2d(2, 2, 3, groups=2))
    assert not can_be_refitted(nn.Conv2d(2, 2, 3, padding="same"))
    assert not can_be_refitted(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert not can_be_refitted(normed)
