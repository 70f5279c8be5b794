"""Options against the noise of half-open gates: none at all, or few gates half-open at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transfer_surgery import TransferSchedule, convert, wrap_optimizer
from transfer_surgery.transfer import project
from transfer_surgery.units import make_gate


def small(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2))
    convert(model, example_input=torch.zeros(1, 4), **options)
    return model


def half_open(z: Tensor) -> float:
    return float(((z > 0) & (z < 1)).float().mean())


@pytest.mark.parametrize("kind", ["hard_concrete", "bernoulli"])
def test_without_noise_training_uses_the_gates_of_prediction(kind: str) -> None:
    model = small(noise="none", gate=kind)
    nn.init.normal_(model[1].log_alpha)
    x, state = torch.randn(5, 4), torch.get_rng_state()
    trained = model.train()(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, model.eval()(x))
    trained.sum().backward()
    assert bool(model[1].log_alpha.grad.any())


def test_without_noise_the_gradient_is_that_of_equation_16() -> None:
    model = small(noise="none").double()
    nn.init.normal_(model[1].log_alpha)
    x = torch.randn(5, 4, dtype=torch.float64)
    model.train()(x).square().sum().backward()
    log_alpha = model[1].log_alpha.detach().double().requires_grad_()
    z = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)
    h = model[0](x)
    y = model[2](z * torch.relu(h) + (1 - z) * torch.sin(h))
    (expected,) = torch.autograd.grad(y.square().sum(), log_alpha)
    torch.testing.assert_close(model[1].log_alpha.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 3.0, 10.0])
def test_whatever_the_spread_a_converted_network_is_unchanged(spread: float) -> None:
    gate = make_gate("hard_concrete", (100_000,), spread=spread)
    assert bool((gate.predict() == 1).all())
    assert gate.log_alpha.std().item() == pytest.approx(spread, rel=0.02)
    model = small(spread=spread).eval()
    x = torch.randn(5, 4)
    assert torch.equal(model(x), nn.Sequential(model[0], nn.ReLU(), model[2])(x))


def test_the_wider_the_spread_the_fewer_gates_are_half_open_at_once() -> None:
    shares = []
    for spread in (1.0, 3.0, 10.0, 30.0):
        gate = make_gate("hard_concrete", (10_000,), spread=spread)
        project([gate], 0.5)
        assert gate.probability().mean().item() == pytest.approx(0.5, abs=1e-3)
        shares.append(half_open(gate.predict().detach()))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.7
    assert shares[-1] < 0.1


def test_a_wide_spread_reaches_the_end_of_a_schedule() -> None:
    model = small(spread=10.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(20))
    for _ in range(20):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool((model[1].gate.predict() == 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": -1.0}, "spread=-1.0: a standard deviation"),
        ({"spread": float("nan")}, "spread=nan"),
        ({"spread": 2.0, "init": "alpha"}, "leave it out with init='alpha'"),
    ],
)
def test_a_spread_that_means_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
