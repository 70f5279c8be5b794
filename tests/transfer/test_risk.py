"""The structural risk: its value against Eq. 14, its gradient against autograd in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from transfer_surgery import (
    GatedActivation,
    HardConcrete,
    PerChannel,
    get_activation,
    structural_risk,
)
from transfer_surgery.transfer.risk import add_risk_gradient
from transfer_surgery.units import make_gate

TEMPERATURE, XI, ZETA = 0.5, -0.2, 1.3


def unit_of(kind: str, log_alpha: Tensor, neurons: int) -> GatedActivation:
    hard_concrete = HardConcrete(temperature=TEMPERATURE, stretch=(XI, ZETA))
    gate = make_gate(hard_concrete if kind == "hard_concrete" else kind, tuple(log_alpha.shape))
    gate.log_alpha.data.copy_(log_alpha)
    relu, sin = get_activation("relu"), get_activation("sin")
    return GatedActivation(relu, sin, gate, granularity=PerChannel(1), neurons=neurons)


def two_units(kind: str = "hard_concrete") -> list[GatedActivation]:
    return [
        unit_of(kind, torch.tensor([8.0, -3.0, 0.5]), neurons=12),
        unit_of(kind, torch.tensor([2.0]), neurons=5),
    ]


def eq_14(log_alpha: Tensor) -> Tensor:
    """The paper's formula as it is written, ``1 - Q(0)``, in float64."""
    cdf = torch.sigmoid(TEMPERATURE * math.log(-XI / ZETA) - log_alpha.double())
    return 1 - cdf


FACTORS: dict[str, Callable[[GatedActivation], float]] = {
    "sum": lambda unit: 1.0,
    "mean": lambda unit: 1 / 4,
    "neurons": lambda unit: unit.neurons / unit.log_alpha.numel(),
}


@pytest.mark.parametrize("reduction", FACTORS)
def test_value_is_eq_14(reduction: str) -> None:
    units = two_units()
    expected = sum(
        FACTORS[reduction](unit) * eq_14(unit.log_alpha.detach()).sum() for unit in units
    )
    risk = structural_risk(nn.Sequential(*units), reduction)
    assert risk.dtype == torch.float32
    torch.testing.assert_close(risk.detach().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", FACTORS)
@pytest.mark.parametrize("kind", ["hard_concrete", "bernoulli"])
def test_added_gradient_is_that_of_gamma_times_the_risk(kind: str, reduction: str) -> None:
    units = two_units(kind)
    add_risk_gradient(units, 0.7, reduction)
    added = [unit.log_alpha.grad for unit in units]
    expected = torch.autograd.grad(
        0.7 * structural_risk(nn.Sequential(*units), reduction), [u.log_alpha for u in units]
    )
    torch.testing.assert_close(added, list(expected))


@pytest.mark.parametrize("log_alpha", [-30.0, -8.0, 0.0, 8.0, 12.0, 12.5, 18.0, 30.0])
def test_gradient_is_exact_however_far_the_gate_is_out(log_alpha: float) -> None:
    unit = unit_of("hard_concrete", torch.tensor([log_alpha]), neurons=1)
    add_risk_gradient([unit], 1.0, "sum")

    # Of the smaller of q and 1 - q, so that float64 does not round it away.
    far = torch.tensor([log_alpha], dtype=torch.float64, requires_grad=True)
    s = far - TEMPERATURE * math.log(-XI / ZETA)
    smaller = torch.sigmoid(s if log_alpha < 0 else -s)
    (expected,) = torch.autograd.grad(smaller.sum(), far)
    assert unit.log_alpha.grad is not None
    assert unit.log_alpha.grad > 0
    torch.testing.assert_close(unit.log_alpha.grad.double(), expected.abs(), rtol=1e-5, atol=0)


def test_gradient_is_added_to_the_one_that_is_there() -> None:
    fresh, used = two_units(), two_units()
    add_risk_gradient(fresh, 1.0, "sum")
    for unit in used:
        unit.log_alpha.grad = torch.full_like(unit.log_alpha, 2.0)
    add_risk_gradient(used, 1.0, "sum", scale=torch.tensor(8.0))
    for a, b in zip(fresh, used, strict=True):
        assert a.log_alpha.grad is not None
        torch.testing.assert_close(b.log_alpha.grad, 2.0 + 8.0 * a.log_alpha.grad)


def test_frozen_gates_get_no_gradient_but_count() -> None:
    units = two_units()
    units[0].log_alpha.requires_grad_(False)
    before = structural_risk(nn.Sequential(*two_units()))
    torch.testing.assert_close(structural_risk(nn.Sequential(*units)), before)
    add_risk_gradient(units, 1.0, "sum")
    assert units[0].log_alpha.grad is None
    assert units[1].log_alpha.grad is not None


@pytest.mark.parametrize("kind", ["line", "copy"])
def test_gates_without_parameters_count_until_they_are_at_0(kind: str) -> None:
    gate = make_gate(kind, (3,))
    relu, sin = get_activation("relu"), get_activation("sin")
    unit = GatedActivation(relu, sin, gate, granularity=PerChannel(1), neurons=3)
    model = nn.Sequential(unit)
    assert structural_risk(model).item() == 3
    add_risk_gradient([unit], 1.0, "sum")  # nothing to do
    gate.progress.fill_(1.0)
    assert structural_risk(model).item() == 0


def test_unknown_reduction_and_unconverted_model_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown reduction 'max'; use one of sum, mean, neurons"):
        structural_risk(nn.Sequential(*two_units()), "max")
    with pytest.raises(ValueError, match=r"call convert\(model"):
        structural_risk(nn.Linear(2, 2))
