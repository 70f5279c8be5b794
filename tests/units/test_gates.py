"""Each kind of gates beside its formulas: samples, predictions, probabilities, precision."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transfer_surgery import Bernoulli, HardConcrete
from transfer_surgery.units import Gate, GateSettings, make_gate

BETA, XI, ZETA = 2 / 3, -0.1, 1.1  # section 4.2

locations, far = st.floats(-30, 30, width=32), st.floats(-300, 300, width=32)


def gate_at(*log_alpha: float, gate: str | GateSettings = "hard_concrete") -> Gate:
    gate = make_gate(gate, (len(log_alpha),))
    gate.log_alpha.data = torch.tensor(log_alpha)
    return gate


# --- Eq. 14-16 in plain Python floats (float64), written from the paper ------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def eq_14(log_alpha: float) -> float:
    """P(z != 0)."""
    return sigmoid(log_alpha - BETA * math.log(-XI / ZETA))


def eq_15(log_alpha: float, eps: float) -> float:
    v = sigmoid((math.log(eps) - math.log(1 - eps) + log_alpha) / BETA)
    return min(1.0, max(0.0, v * (ZETA - XI) + XI))


def eq_15_slope(log_alpha: float, eps: float) -> float:
    v = sigmoid((math.log(eps) - math.log(1 - eps) + log_alpha) / BETA)
    inside = 0 < v * (ZETA - XI) + XI < 1
    return (ZETA - XI) * v * (1 - v) / BETA if inside else 0.0


def eq_16(log_alpha: float) -> float:
    return min(1.0, max(0.0, sigmoid(log_alpha) * (ZETA - XI) + XI))


# --- the hard concrete gate --------------------------------------------------------------------


@given(st.lists(locations, min_size=1, max_size=30))
def test_predict_is_equation_16(log_alpha):
    expected = torch.tensor([eq_16(a) for a in log_alpha], dtype=torch.float64)
    found = gate_at(*log_alpha).predict().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)


@given(st.lists(locations, min_size=1, max_size=30))
def test_probability_is_equation_14_and_its_gradient_q_times_1_minus_q(log_alpha):
    gate = gate_at(*log_alpha)
    gate.probability().sum().backward()
    q = [eq_14(a) for a in log_alpha]
    rest = [sigmoid(BETA * math.log(-XI / ZETA) - a) for a in log_alpha]  # 1 - q without cancelling
    torch.testing.assert_close(gate.probability().tolist(), q, rtol=3e-6, atol=0)
    slope = [a * b for a, b in zip(q, rest, strict=True)]
    torch.testing.assert_close(gate.log_alpha.grad.tolist(), slope, rtol=3e-6, atol=1.2e-7)


@given(st.lists(far, min_size=1, max_size=30), st.integers(0, 2**32))
def test_sample_is_equation_15_of_one_uniform_draw_with_its_gradient(log_alpha, seed):
    gate = gate_at(*log_alpha, 0.0)  # the last one keeps the draw from being skipped
    torch.manual_seed(seed)
    eps = torch.rand(len(log_alpha) + 1).clamp(2.0**-25, 1 - 2.0**-24).tolist()
    torch.manual_seed(seed)
    z = gate.sample(batch=7)
    z.sum().backward()
    pairs = list(zip([*log_alpha, 0.0], eps, strict=True))
    torch.testing.assert_close(z.tolist(), [eq_15(*p) for p in pairs], rtol=0, atol=2e-6)
    # At its edges the slope jumps: rounding decides there.
    sure = [abs(eq_15(*p) - 0.5) < 0.4999 or eq_15_slope(*p) == 0 for p in pairs]
    slopes = [eq_15_slope(*p) if s else 0.0 for p, s in zip(pairs, sure, strict=True)]
    found = torch.where(torch.tensor(sure), gate.log_alpha.grad, 0.0)
    torch.testing.assert_close(found.tolist(), slopes, rtol=1e-4, atol=1e-5)


# log 11 = 2.397895; float32 resolves 1e-6 there
@given(st.floats(2.3979, 1e4), st.floats(-2.39788, 2.39788))
def test_predictions_are_exactly_0_and_1_beyond_2_3979_only(beyond, within):
    assert gate_at(beyond, -beyond).predict().tolist() == [1.0, 0.0]
    assert 0 < gate_at(within).predict().item() < 1


def test_temperature_and_stretch_enter_all_three_equations():
    gate = gate_at(0.7, gate=HardConcrete(temperature=0.4, stretch=(-0.3, 1.2)))
    assert gate.probability().item() == pytest.approx(sigmoid(0.7 - 0.4 * math.log(0.3 / 1.2)))
    assert gate.predict().item() == pytest.approx(sigmoid(0.7) * 1.5 - 0.3)
    torch.manual_seed(3)
    eps = torch.rand(1).item()
    v = sigmoid((math.log(eps / (1 - eps)) + 0.7) / 0.4)
    torch.manual_seed(3)
    assert gate.sample(1).item() == pytest.approx(min(1, max(0, v * 1.5 - 0.3)), abs=1e-6)


# --- the start ---------------------------------------------------------------------------------


def test_locations_start_as_normal_around_8():
    gate = make_gate("hard_concrete", (100_000,))
    assert (gate.predict() == 1).all()
    log_alpha = gate.log_alpha
    assert abs(log_alpha.mean().item() - 8) < 5 / math.sqrt(100_000)
    assert abs(log_alpha.std().item() - 1) < 5 / math.sqrt(200_000)


def test_the_papers_wording_starts_at_a_prediction_of_0_967():
    gate = make_gate(HardConcrete(init="alpha"), (100_000,))
    alpha = gate.log_alpha.exp()
    assert abs(alpha.mean().item() - 8) < 5 / math.sqrt(100_000)
    assert gate.predict().median().item() == pytest.approx(8 / 9 * 1.2 - 0.1, abs=1e-3)  # 0.967


# --- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [HardConcrete, Bernoulli])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 5)])
@pytest.mark.parametrize(("noise", "lead"), [("batch", ()), ("example", (8,))])
def test_noise_per_batch_or_example_decides_the_shape_of_a_sample(settings, shape, noise, lead):
    gate = make_gate(settings(noise=noise), shape)
    gate.log_alpha.data.zero_()
    assert gate.sample(8).shape == (*lead, *shape)
    assert gate.predict().shape == gate.probability().shape == shape


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("noise", ["batch", "example"])
def test_certain_gates_draw_no_random_number_but_have_the_shape_of_a_sample(shape, noise):
    gate = make_gate(HardConcrete(noise=noise), shape)
    gate.log_alpha.data.fill_(19.0)
    certain = gate.sample(8)
    state = torch.get_rng_state()
    assert torch.equal(gate.sample(8), torch.ones_like(certain))
    assert torch.equal(torch.get_rng_state(), state)
    gate.log_alpha.data.fill_(18.9)
    assert gate.sample(8).shape == certain.shape
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["hard_concrete", "bernoulli"])
@pytest.mark.parametrize("eps", [2.0**-25, 1 - 2.0**-24])
def test_no_draw_moves_a_certain_gate(name, eps, monkeypatch):
    gate = gate_at(19.0, -19.0, gate=name)
    monkeypatch.setattr(gate, "draw_noise", lambda batch: torch.full((2,), eps))
    assert gate.sample(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-24])
def test_extreme_draws_give_finite_samples_and_gradients(drawn, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, drawn))
    gate = gate_at(0.0, 15.0, -15.0)
    z = gate.sample(1)
    z.sum().backward()
    assert z.isfinite().all()
    assert gate.log_alpha.grad.isfinite().all()


# --- precision ---------------------------------------------------------------------------------

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "to": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("name", ["hard_concrete", "bernoulli", "line"])
def test_gates_stay_float32_when_their_model_is_cast(name, cast):
    model = nn.Sequential(nn.Linear(3, 3), make_gate(name, (3,)))
    before = copy.deepcopy(model[1].state_dict())
    cast(model)
    assert model[0].weight.dtype != torch.float32
    for key, value in model[1].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])
    assert model[1].sample(2).dtype == model[1].predict().dtype == torch.float32


def test_autocast_leaves_gates_in_float32():
    gate = gate_at(0.3, -0.2)
    expected = gate.predict(), gate.probability()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate.predict(), expected[0])
        assert torch.equal(gate.probability(), expected[1])
        assert gate.sample(1).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["hard_concrete", "bernoulli", "line", "copy"])
def test_the_default_dtype_does_not_reach_gates(name, dtype):
    torch.set_default_dtype(dtype)
    try:
        gate = make_gate(name, (3,))
        if gate.learned:
            gate.log_alpha.data.zero_()
        dtypes = {gate.sample(2).dtype, gate.predict().dtype, gate.probability().dtype}
        dtypes |= {value.dtype for value in gate.state_dict().values()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("log_alpha", [0.0, 25.0])
def test_the_default_device_does_not_reach_samples(log_alpha):
    gate = gate_at(log_alpha)
    with torch.device("meta"):
        assert gate.sample(2).device.type == "cpu"


def test_gates_can_be_sampled_on_fake_tensors_and_under_vmap():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert make_gate("hard_concrete", (3,)).sample(2).shape == (3,)
    gate = make_gate("hard_concrete", (3,))

    def sample(log_alpha):
        return torch.func.functional_call(
            _Sampler(gate), {"gate.log_alpha": log_alpha}, (torch.ones(1),)
        )

    stacked = torch.zeros(5, 3)
    assert torch.vmap(sample, randomness="different")(stacked).shape == (5, 3)
    with pytest.raises(RuntimeError, match=r'drawn at random in .* give it randomness="different"'):
        torch.vmap(sample)(stacked)


class _Sampler(nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return self.gate.sample(len(x))


# --- the paper's other gates -------------------------------------------------------------------


def test_bernoulli_samples_are_0_or_1_with_probability_sigmoid():
    for log_alpha in (-2.0, 0.0, 1.5):
        gate = gate_at(*[log_alpha] * 100_000, gate="bernoulli")
        z = gate.sample(1)
        p = sigmoid(log_alpha)
        assert set(z.tolist()) == {0.0, 1.0}
        assert abs(z.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 100_000)
        assert gate.probability()[0].item() == pytest.approx(p)


def test_bernoulli_gradients_pass_straight_through_the_probability():
    gate = gate_at(-1.0, 0.5, gate="bernoulli")
    gate.sample(1).sum().backward()
    expected = [sigmoid(a) * sigmoid(-a) for a in (-1.0, 0.5)]
    torch.testing.assert_close(gate.log_alpha.grad.tolist(), expected, rtol=1e-5, atol=0)


def test_bernoulli_predicts_the_likelier_value():
    assert gate_at(-0.1, 0.1, gate="bernoulli").predict().tolist() == [0.0, 1.0]
    assert (make_gate("bernoulli", (50,)).predict() == 1).all()


@pytest.mark.parametrize(
    ("name", "progress", "z"),
    [
        ("line", 0.0, 1.0),
        ("line", 0.25, 0.75),
        ("line", 1.0, 0.0),
        ("copy", 0.0, 1.0),
        ("copy", 0.499, 1.0),
        ("copy", 0.5, 0.0),
        ("copy", 1.0, 0.0),
    ],
)
def test_line_and_copy_follow_the_schedule_without_parameters(name, progress, z):
    gate = make_gate(name, (2, 3))
    gate.progress.fill_(progress)
    for value in (gate.sample(4), gate.predict()):
        assert torch.equal(value, torch.full((2, 3), z))
    assert torch.equal(gate.probability(), torch.full((2, 3), float(z > 0)))
    assert not gate.learned
    assert not list(gate.parameters())
