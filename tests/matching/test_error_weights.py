"""Weights of the fits: what an error at a site costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import convert, match_targets, swap_targets
from transfer_surgery._running import prediction_mode
from transfer_surgery.matching import samples
from transfer_surgery.matching.fitting.target_families import Sinusoid
from transfer_surgery.matching.fitting.target_fit import Inputs, TargetFit
from transfer_surgery.matching.two_networks.site_gradients import site_calls
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import gated_activations


def test_weighted_fits_are_those_of_independent_least_squares():
    torch.manual_seed(0)
    x = torch.randn(2, 600, dtype=torch.float64)
    y, weights = x.relu(), torch.rand(2, 600, dtype=torch.float64) * torch.tensor([[1.0], [1e-6]])
    inputs = Inputs()
    inputs.add(x)
    fit = TargetFit(Sinusoid(0.0, (0.7,)), inputs, ridge=0.0)
    for part in zip(*(t.split(250, 1) for t in (x, y, weights)), strict=True):
        fit.add(*part)
    solution = fit.solve()
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


def test_the_weights_of_all_sites_take_no_more_memory_than_the_values_of_one(monkeypatch):
    monkeypatch.setattr(samples, "_ELEMENTS", 6 * 300)
    monkeypatch.setattr(samples, "_LEAST", 1)
    layers = [part for _ in range(3) for part in (nn.Linear(6, 6), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(600, 6)
    convert(model, example_input=x)
    for weights, values in ((None, 300), ("gradient", 100)):
        report = match_targets(model, x.split(300), weights=weights)
        assert [row.values for row in report] == [values] * 3


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_a_drawn_label(frozen):
    model, x = small()
    model.requires_grad_(not frozen)
    (unit,) = (unit for _, unit in gated_activations(model))
    with prediction_mode(model):
        (call,) = site_calls(TwoNetworks(model, [unit], [x]), [unit], x, seed=0, logits=True)[unit]
    found = call.squared_gradient
    with torch.no_grad():
        p = model(x).softmax(1)
        # For each label k: the gradient of -log p_k in the outputs of the site, in closed form.
        every = torch.stack([((p - F.one_hot(torch.tensor(k), 3)) @ model[2].weight).square()
                             for k in range(3)])  # fmt: skip
    drawn = torch.isclose(found, every, rtol=1e-3).all(2)  # by label and example
    assert drawn.any(0).all()
    assert drawn.any(1).sum() > 1  # not always the same label
    assert all(p.grad is None for p in model.parameters())


class Boxes(nn.Module):
    """Two outputs in units that have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Linear(4, 6), nn.ReLU()
        self.boxes, self.score = nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.act(self.stem(x))
        return {"boxes": 640 * self.boxes(h), "score": self.score(h).sigmoid()}


def test_outputs_that_are_no_logits_are_weighed_by_their_relative_errors():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    model = convert(Boxes().eval(), "sin", example_input=x)
    networks = TwoNetworks(model, [model.act], [x])
    with prediction_mode(model):
        draws = [
            site_calls(networks, [model.act], x, seed, logits=False)[model.act][0].squared_gradient
            for seed in range(300)
        ]
    with torch.no_grad():
        boxes, score = model(x).values()
    # The slopes of each output in closed form, over its variance and the number of its elements.
    variance = (boxes - boxes.mean(0)).square().mean()
    expected = (640 * model.boxes.weight).square().sum(0) / (4 * variance)
    slope = (score * (1 - score)) * model.score.weight
    expected = expected + slope.square() / score.var(correction=0)
    torch.testing.assert_close(torch.stack(draws).mean(0), expected.detach(), rtol=0.35, atol=1e-3)
    assert match_targets(model, [x], weights="gradient").rows[0].r2 > 0.8
    swap_targets(model, keep=0.5, batches=[x])


def test_outputs_without_a_gradient_cannot_weigh_errors():
    class Detached(Boxes):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"boxes": super().forward(x)["boxes"].detach()}

    x = torch.randn(64, 4)
    with pytest.raises(ValueError, match="no gradient comes from the outputs"):
        match_targets(convert(Detached(), example_input=x), [x], weights="gradient")


def test_channels_that_nobody_reads_do_not_shape_a_shared_target():
    """The unread channel has inputs ten times as large."""
    errors = {}
    for choice in (None, "gradient"):
        model, x = small("layer")
        model[0].weight.data[0] *= 10
        model[2].weight.data[:, 0] = 0
        with torch.no_grad():
            before = model(x)
            match_targets(model, [x], weights=choice)
            errors[choice] = (swap_targets(model)(x) - before).square().mean().item()
    assert errors["gradient"] < 0.5 * errors[None]


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
    with pytest.raises(ValueError, match="weights='hessian': use None or 'gradient'"):
        match_targets(model, [x], weights="hessian")
