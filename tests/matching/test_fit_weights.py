"""Weights of the fits: what an error at a site costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import convert, get_activation, match_targets, swap_targets
from transfer_surgery._running import prediction_mode
from transfer_surgery.matching import SideBySide
from transfer_surgery.matching.fit_weights import gradient_weights, next_layer_weights
from transfer_surgery.matching.least_squares import Inputs, NormalEquations
from transfer_surgery.matching.target_families import family_of
from transfer_surgery.units import gated_activations


def test_weighted_fits_are_those_of_independent_least_squares():
    torch.manual_seed(0)
    x = torch.randn(2, 600, dtype=torch.float64)
    y, weights = x.relu(), torch.rand(2, 600, dtype=torch.float64) * torch.tensor([[1.0], [1e-6]])
    inputs = Inputs()
    inputs.add(x)
    equations = NormalEquations(family_of(get_activation("sin"), (0.7,), 0.0), inputs, ridge=0.0)
    for part in zip(*(t.split(250, 1) for t in (x, y, weights)), strict=True):
        equations.add(*part)
    solution = equations.solve()
    a, w, c, b = (p[:, None] for p in solution.parameters)
    error = a * torch.sin(w * x + c) + b - y
    for group in range(2):
        root = weights[group].sqrt()
        argument = 0.7 * x[group] / x[group].std(correction=0)
        features = torch.stack([argument.sin(), argument.cos(), torch.ones_like(argument)], 1)
        target = root[:, None] * y[group, :, None]
        found = torch.linalg.lstsq(root[:, None] * features, target).solution
        expected = (features @ found)[:, 0] - y[group]
        torch.testing.assert_close(error[group], expected, rtol=1e-3, atol=1e-4)
        residual = (weights[group] * expected.square()).sum()
        torch.testing.assert_close(solution.residual[group], residual, rtol=1e-3, atol=0.0)


def small(granularity: str = "channel", **options) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, **options))
    x = torch.randn(64, 4)
    return convert(model.eval(), "sin", example_input=x, granularity=granularity), x


def both(model: nn.Module, x: torch.Tensor) -> tuple[SideBySide, object]:
    unit = next(unit for _, unit in gated_activations(model))
    return SideBySide(model, [unit], [x]), unit


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_a_drawn_label(frozen):
    model, x = small()
    model.requires_grad_(not frozen)
    networks, unit = both(model, x)
    with prediction_mode(model):
        (found,) = gradient_weights(networks, unit, x, 1, seed=0)
    with torch.no_grad():
        p = model(x).softmax(1)
        # For each label k: the gradient of -log p_k in the outputs of the site, in closed form.
        every = torch.stack([((p - F.one_hot(torch.tensor(k), 3)) @ model[2].weight).square()
                             for k in range(3)])  # fmt: skip
    assert found.mean().item() == pytest.approx(1, rel=1e-4)
    scale = ((found - 0.01 / 1.01) / every).flatten(1)
    # Up to one factor for all elements, each example is that of one of the labels.
    factors = scale.unflatten(1, (64, 6))
    constant = factors.std(2) / factors.mean(2) < 1e-2
    assert constant.any(0).all()
    chosen = factors.mean(2)[constant]
    assert chosen.median().item() == pytest.approx(chosen.mean().item(), rel=0.05)
    assert all(p.grad is None for p in model.parameters())


def test_the_next_layer_says_which_channels_count():
    model, x = small("layer")
    model[2].weight.data[:, :3] *= 10
    networks, unit = both(model, x)
    found = next_layer_weights(networks, unit, torch.zeros(64, 6))
    squares = model[2].weight.detach().square().sum(0)
    torch.testing.assert_close(found, ((squares / squares.mean() + 0.01) / 1.01)[None])


def test_channels_of_a_convolution_and_several_readers():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.one, self.two = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(x)
            return torch.cat([self.one(y), self.two(y)], 1)

    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    model = convert(Two().eval(), "sin", example_input=x, granularity="layer")
    found = next_layer_weights(*both(model, x), x)
    squares = sum(layer.weight.detach().square().sum((0, 2, 3)) for layer in (model.one, model.two))
    assert found.shape == (1, 4, 1, 1)
    torch.testing.assert_close(
        found.flatten(), (squares / squares.mean() + 0.01) / 1.01, rtol=1e-4, atol=1e-5
    )


def test_where_no_layer_reads_the_output_all_channels_count_the_same():
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), "sin", example_input=x)
    assert torch.equal(next_layer_weights(*both(model, x), x), torch.ones(1, 1))


@pytest.mark.parametrize("weights", ["gradient", "next_layer"])
def test_channels_that_nobody_reads_do_not_shape_a_shared_target(weights):
    """The unread channel has inputs ten times as large."""
    errors = {}
    for choice in (None, weights):
        model, x = small("layer")
        model[0].weight.data[0] *= 10
        model[2].weight.data[:, 0] = 0
        with torch.no_grad():
            before = model(x)
            match_targets(model, [x], weights=choice)
            errors[choice] = (swap_targets(model)(x) - before).square().mean().item()
    assert errors[weights] < 0.5 * errors[None]


def test_sites_that_write_into_their_input_and_frozen_networks_can_be_weighted():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act, self.out = nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            self.act(y)
            return self.out(y)

    torch.manual_seed(0)
    x = torch.randn(64, 4)
    for frozen in (False, True):
        model = convert(InPlace().requires_grad_(not frozen), "sin", example_input=x)
        found = match_targets(model, [x], weights="gradient")
        assert found.rows[0].r2 > 0.8


def test_unknown_weights_are_refused():
    model, x = small()
    with pytest.raises(
        ValueError, match="weights='hessian': use one of None, gradient, next_layer"
    ):
        match_targets(model, [x], weights="hessian")
