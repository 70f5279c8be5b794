"""Fits of one site: a * f(w*x + c) + b by least squares, per group of elements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from transfer_surgery import get_activation
from transfer_surgery.matching.fitting.target_families import Sinusoid, family_of
from transfer_surgery.matching.fitting.target_fit import Inputs, TargetFit
from transfer_surgery.units import fitted_value

GRID = (0.4, 0.6, 0.8, 1.0, 1.3)


def fit(target: str, x, y, *, parts: int = 1, ridge: float = 0.0):
    """A solution for data of shape (groups, N), given in parts, and its predictions."""
    inputs = Inputs()
    for part in x.chunk(parts, 1):
        inputs.add(part)
    family = family_of(get_activation(target))
    if isinstance(family, Sinusoid):
        family = replace(family, frequencies=GRID)
    equations = TargetFit(family, inputs, ridge)
    for a, b in zip(x.chunk(parts, 1), y.chunk(parts, 1), strict=True):
        equations.add(a, b)
    solution = equations.solve()
    numbers = tuple(p[:, None] for p in solution.parameters)
    return solution, fitted_value(x.double(), get_activation(target), numbers)


@given(
    amplitude=st.floats(0.1, 10),
    frequency=st.sampled_from(GRID),
    phase=st.floats(-3, 3),
    offset=st.floats(-5, 5),
    scale=st.floats(0.01, 100),
    shift=st.floats(-3, 3),
    target=st.sampled_from(["sin", "cos"]),
)
def test_a_sinusoid_of_the_grid_is_found(amplitude, frequency, phase, offset, scale, shift, target):
    u = torch.randn(1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = scale * ((u - u.mean()) / u.std(correction=0) + shift)
    y = amplitude * torch.sin(frequency / scale * x + phase) + offset
    _, predicted = fit(target, x, y)
    torch.testing.assert_close(predicted, y, rtol=1e-4, atol=1e-4 * amplitude)


@pytest.mark.parametrize("source", ["relu", "gelu", "hardswish"])
def test_the_best_frequency_is_that_of_independent_least_squares(source):
    x = torch.randn(3, 2000, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [20.0]]) + 0.3
    y = get_activation(source)(x)
    solution, predicted = fit("sin", x, y, parts=3)
    for group in range(3):
        errors = []
        for w in GRID:
            u = w * x[group] / x[group].std(correction=0)
            features = torch.stack([u.sin(), u.cos(), torch.ones_like(u)], 1)
            found = torch.linalg.lstsq(features, y[group, :, None]).solution
            errors.append((features @ found - y[group, :, None]).square().sum())
        assert solution.residual[group].item() == pytest.approx(min(errors).item(), rel=1e-3)
    torch.testing.assert_close(
        solution.residual, (predicted - y).square().sum(1), rtol=1e-3, atol=0
    )
    total = (y - y.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(solution.total, total)


def test_relu_of_normal_input_is_explained_as_the_design_says():
    x = torch.randn(1, 100_000, dtype=torch.float64)
    solution, _ = fit("sin", x, x.relu(), ridge=1e-4)
    assert 1 - (solution.residual / solution.total).item() == pytest.approx(0.97, abs=0.01)


@pytest.mark.parametrize("target", ["square", "polynomial"])
def test_a_parabola_is_found_in_closed_form(target):
    x = torch.randn(2, 300, dtype=torch.float64) * 5 + 2
    y = torch.tensor([[2.0], [-0.1]]) * x**2 + torch.tensor([[-3.0], [1.0]]) * x + 7
    _, predicted = fit(target, x, y)
    torch.testing.assert_close(predicted, y, rtol=1e-5, atol=1e-3)


@given(
    coefficients=st.integers(2, 8).flatmap(
        lambda d: st.lists(st.floats(-3, 3), min_size=d + 1, max_size=d + 1)
    ),
    scale=st.floats(0.01, 100),
    shift=st.floats(-3, 3),
    tails=st.sampled_from([1, 3]),
)
def test_a_polynomial_is_found_and_its_argument_is_between_minus_1_and_1(
    coefficients, scale, shift, tails
):
    u = torch.randn(1, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = scale * (u**tails + shift)
    y = torch.from_numpy(np.polynomial.polynomial.polyval((x / scale).numpy(), coefficients))
    solution, predicted = fit(f"polynomial(degree={len(coefficients) - 1})", x, y)
    torch.testing.assert_close(predicted, y, rtol=1e-6, atol=1e-6 * float(y.abs().max()) + 1e-9)
    _, w, c, _, *k = solution.parameters
    assert (w * x + c).aminmax() == (pytest.approx(-1), pytest.approx(1))
    assert torch.stack(k).norm().item() == pytest.approx(1) or float(y.std()) == 0


def test_a_polynomial_fit_is_that_of_independent_least_squares():
    scale = (0.1, 1.0, 20.0)
    x = torch.randn(3, 2000, dtype=torch.float64) ** 3 * torch.tensor(scale)[:, None] + 0.3
    y = x.relu()
    solution, predicted = fit("polynomial(degree=4)", x, y, parts=3)
    for group in range(3):
        found = np.polynomial.Polynomial.fit(x[group].numpy(), y[group].numpy(), 4)
        expected = torch.from_numpy(found(x[group].numpy()))
        torch.testing.assert_close(predicted[group], expected, rtol=1e-5, atol=1e-5 * scale[group])
    torch.testing.assert_close(
        solution.residual, (predicted - y).square().sum(1), rtol=1e-6, atol=0
    )


def test_the_range_counts_for_a_share_of_the_data_of_a_polynomial():
    x = torch.randn(1, 500, dtype=torch.float64)
    inputs, degree = Inputs(), 4
    inputs.add(x, torch.tensor([[-3.0, 30.0]]))  # the sample has no outlier
    equations = TargetFit(family_of(get_activation("polynomial(degree=4)")), inputs, 0.0)
    equations.add(x, x.relu())
    equations.add_range(inputs, torch.relu)
    solution = equations.solve()
    end = torch.tensor([[30.0]], dtype=torch.float64)
    target = get_activation("polynomial", degree=degree)
    found = fitted_value(end, target, tuple(p[:, None] for p in solution.parameters))
    grid = np.linspace(-3, 30, 65)
    every, weights = (
        np.append(x.numpy(), grid),
        np.append(np.ones(500), np.full(65, 0.002 * 500 / 65)),
    )
    expected = np.polynomial.Polynomial.fit(every, np.maximum(every, 0), degree, w=weights**0.5)
    assert found.item() == pytest.approx(expected(30.0), rel=1e-4)
    assert abs(found.item() - 30) < 10
    _, w, c, *_ = solution.parameters
    assert (30 * w + c).item() == pytest.approx(1)


def test_other_targets_are_searched_from_the_target_as_it_is():
    x = torch.randn(1, 500, dtype=torch.float64) * 3 - 1
    _, predicted = fit("hardswish", x, 2 * F.hardswish(x) - 1)
    torch.testing.assert_close(predicted, 2 * F.hardswish(x) - 1, rtol=1e-4, atol=1e-4)
    solution, _ = fit("hardswish", x, F.silu(x))
    assert solution.residual.item() < (F.hardswish(x) - F.silu(x)).square().sum().item()


@pytest.mark.parametrize("target", ["sin", "square", "snake", "relu", "polynomial(degree=4.0)"])
def test_dead_and_constant_channels_are_met_exactly(target):
    x = torch.stack([-torch.rand(200) - 1, torch.full((200,), 2.0), torch.zeros(200)]).double()
    _, predicted = fit(target, x, x.relu(), ridge=1e-4)
    torch.testing.assert_close(predicted, x.relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["sin", "square", "snake", "polynomial(degree=4)"])
@pytest.mark.parametrize("varying", [1.0, 0.1])
def test_a_channel_that_hardly_varies_gets_a_frequency_as_the_others(target, varying):
    x = torch.randn(32, 500, dtype=torch.float64)
    x[int(32 * varying) :] *= 1e-5
    x[0] *= 1e-5
    solution, predicted = fit(target, x, x.relu() + 1, ridge=1e-4)
    w = solution.parameters[1]
    assert w[0] < 5 * w[1]
    torch.testing.assert_close(predicted[0], x[0].relu() + 1, rtol=0, atol=1e-4)
