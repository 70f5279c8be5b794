"""Layers refitted behind a site: least squares for their weights, and which layers can be."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from transfer_surgery import convert, match_targets
from transfer_surgery.matching.layer_refit import LayerFit, layers_to_refit


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


def test_only_plain_trainable_weights_are_refitted_and_the_others_are_named():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    pruned = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older kind of weight norm, still used
        older = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    expected = {
        nn.Conv2d(2, 2, 3): None,
        nn.Linear(2, 2): None,
        nn.Conv2d(2, 2, 3, groups=2): "a grouped convolution",
        nn.Conv2d(2, 2, 3, padding="same"): "its padding",
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"): "its padding",
        nn.Conv1d(2, 2, 3): "a Conv1d",
        nn.ConvTranspose2d(2, 2, 3): "a ConvTranspose2d",
        parametrizations.weight_norm(nn.Linear(2, 2)): "its weight is computed at each call",
        older: "its weight is computed at each call",
        pruned: "its weight is computed at each call",
        frozen: "frozen",
    }
    layers, left = layers_to_refit(nn.ModuleList(expected))
    assert layers == [layer for layer, reason in expected.items() if reason is None]
    assert left == {layer: reason for layer, reason in expected.items() if reason}


def test_layers_that_are_left_alone_keep_their_weights_and_stand_in_the_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    x = torch.randn(256, 4)
    report = match_targets(convert(model, example_input=x), [x], refit=True)
    assert torch.equal(model[2].weight, before)
    assert (report.refitted, report.left) == (("4",), {"2": "frozen"})
    assert "1 layer was not refitted: 2 (frozen)." in str(report)
