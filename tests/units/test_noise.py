"""``noise="none"``: training uses the gates of prediction."""

import pytest
import torch
from torch import nn

from transfer_surgery import Bernoulli, HardConcrete, convert
from transfer_surgery.units import GateSettings, SampledSettings


def small(gate: GateSettings) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2))
    convert(model, example_input=torch.zeros(1, 4), gate=gate)
    return model


@pytest.mark.parametrize("kind", [HardConcrete, Bernoulli])
def test_without_noise_training_uses_the_gates_of_prediction(kind: type[SampledSettings]) -> None:
    model = small(kind(noise="none"))
    nn.init.normal_(model[1].log_alpha)
    x, state = torch.randn(5, 4), torch.get_rng_state()
    trained = model.train()(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, model.eval()(x))
    trained.sum().backward()
    assert bool(model[1].log_alpha.grad.any())


def test_without_noise_the_gradient_is_that_of_equation_16() -> None:
    model = small(HardConcrete(noise="none")).double()
    nn.init.normal_(model[1].log_alpha)
    x = torch.randn(5, 4, dtype=torch.float64)
    model.train()(x).square().sum().backward()
    log_alpha = model[1].log_alpha.detach().double().requires_grad_()
    z = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)
    h = model[0](x)
    y = model[2](z * torch.relu(h) + (1 - z) * torch.sin(h))
    (expected,) = torch.autograd.grad(y.square().sum(), log_alpha)
    torch.testing.assert_close(model[1].log_alpha.grad.double(), expected, rtol=1e-4, atol=1e-5)
