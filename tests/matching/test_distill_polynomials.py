"""distill of polynomials: inputs far outside of the range of the fit, and what overflows."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    DistillWarning,
    convert,
    distill,
    match_targets,
    range_penalty,
    swap_targets,
)
from transfer_surgery.matching.distilling.polynomial_range import FittedRanges
from transfer_surgery.units import gated_activations

HELD_OUT = 64


def polynomials(sites: int, degree: int, times: float) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A network of polynomials, its teacher, and inputs of which a few are far outside."""
    torch.manual_seed(0)
    layers = [layer for _ in range(sites) for layer in (nn.Linear(8, 8), nn.ReLU())]
    teacher = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
    x = torch.randn(512, 8)
    model = convert(copy.deepcopy(teacher), f"polynomial(degree={degree})", example_input=x)
    match_targets(model, [x], refit=True)
    swap_targets(model)
    x[::HELD_OUT] *= times
    return model, teacher, x


def small_or_infinite(now: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The squared error; infinite as soon as an output is above 0.4, as that of an overflow."""
    return (now - wanted).square().mean() / (now.detach().abs().max() < 0.4)


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")  # a few steps will do here
def test_an_input_far_outside_of_the_fit_does_not_spoil_the_training_of_polynomials():
    model, teacher, x = polynomials(6, 3, times=20)
    assert not model(x).isfinite().all()
    ends = [unit.fitted.w.clone() for _, unit in gated_activations(model)]
    batches = [*x[:256].split(32), x[257:320]]  # the last one, without such inputs, is looked at
    found = distill(model, teacher, batches, steps=10, variation=0.0, lr=1e-3)
    assert max(found) < 1e6
    units = [unit for _, unit in gated_activations(model)]
    assert not any(unit.bounded for unit in units)
    assert all(torch.equal(unit.fitted.w, w) for unit, w in zip(units, ends, strict=True))


@pytest.mark.parametrize("last", [HELD_OUT, HELD_OUT - 1])  # whether it has such an input itself
def test_a_start_that_overflows_is_trained_until_the_outputs_are_finite(last):
    model, teacher, x = polynomials(3, 2, times=5)
    batches = [*x.split(HELD_OUT) * 2, x[-last:]]
    assert model(x[-HELD_OUT:]).abs().max() > 0.5
    with pytest.warns(DistillWarning, match=r"overflow at the start, .* range .*: \d \(\d"):
        found = distill(
            model,
            teacher,
            batches,
            steps=60,
            loss=small_or_infinite,
            variation=0.0,
            lr=0.01,
        )
    assert found.kept > 0
    assert model(x[-HELD_OUT:]).abs().max() < 0.4


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
def test_outputs_that_overflow_to_the_end_are_refused_with_the_names_of_the_sites():
    model, teacher, x = polynomials(6, 3, times=20)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"overflow after 5 steps .*: 1 \(.*\), 3 \(.*keep="):
        distill(model, teacher, x.split(HELD_OUT), steps=5, variation=0.0)
    assert_same_bits(model, before)


@pytest.mark.filterwarnings("ignore::transfer_surgery.MatchWarning")
def test_polynomials_that_count_but_were_not_fitted_are_refused():
    model, teacher, x = polynomials(2, 2, times=1)
    model = convert(copy.deepcopy(teacher), "polynomial", example_input=x)
    match_targets(model, [x], include="1")
    swap_targets(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^3: this polynomial was not fitted"):
        distill(model, teacher, x.split(HELD_OUT), steps=1)
    assert_same_bits(model, before)
    with range_penalty(model), pytest.raises(ValueError, match=r"^3: this polynomial was not"):
        model.train()(x)


class Auxiliary(nn.Module):
    """A head that training alone has, which `match_targets` and `distill` do not come to."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.act(self.main(x))
        return y + self.head(x) if self.training else y


@pytest.mark.filterwarnings("ignore::transfer_surgery.MatchWarning")
@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
def test_a_polynomial_that_does_not_run_need_not_be_fitted():
    torch.manual_seed(0)
    teacher, x = Auxiliary().eval(), torch.randn(256, 8)
    model = convert(copy.deepcopy(teacher), "polynomial", example_input=x)
    match_targets(model, [x])
    unfitted = [path for path, unit in gated_activations(model) if unit.fitted is None]
    assert unfitted == ["head.1"]
    assert len(distill(swap_targets(model), teacher, x.split(HELD_OUT), steps=2)) == 2


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
def test_a_message_names_sites_by_their_paths_in_the_whole_model():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    teacher, x = copy.deepcopy(nn.Sequential(*parts)).eval(), torch.randn(256, 8)
    for part in parts:
        match_targets(convert(part, "polynomial", example_input=x), [x])
    model = swap_targets(nn.Sequential(*parts))
    with pytest.raises(ValueError, match=r"overflow after 1 steps .*: 0\.1 \(.*\), 1\.1 \("):
        distill(model, teacher, [1e15 * x], steps=1, variation=0.0)


def test_inputs_that_are_nan_are_no_overflow():
    model, teacher, x = polynomials(1, 2, times=torch.nan)
    with pytest.raises(ValueError, match="look for NaN in the batches"):
        distill(model, teacher, x.split(HELD_OUT), steps=1)


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
def test_inputs_outside_of_the_range_are_punished():
    model, teacher, x = polynomials(1, 2, times=3)
    ((_, unit),) = gated_activations(model)
    _, w, c, *_ = unit.fitted.expand(model[0](x))
    outside = ((w * model[0](x) + c).abs() - 1).clamp_min(0).amax(1).square().mean()
    assert outside > 1e-3
    with torch.no_grad():
        unit.bounded = True
        error = (model(x) - teacher(x)).square().mean()
        unit.bounded = False
    found = distill(model, teacher, x, steps=1, loss="mse", features=[], variation=0.0, lr=1e-12)
    assert found[0] == pytest.approx((error + 0.05 * outside).item(), rel=1e-4)


def test_the_penalty_counts_all_calls_of_a_site_and_sites_of_parts_that_were_converted_alone():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    parts = [nn.Sequential(block, block), nn.Sequential(nn.Linear(4, 4), nn.ReLU())]
    x, seen = torch.randn(256, 4), []
    for part in parts:
        match_targets(convert(part, "polynomial", example_input=x), [x])
    model = swap_targets(nn.Sequential(*parts)).train()
    units = [unit for _, unit in gated_activations(model)]
    for unit in units:
        unit.register_forward_pre_hook(lambda unit, args: seen.append((unit, *args)))
    ranges = FittedRanges(model)
    with ranges.watched():
        model(3 * x)
        found = ranges.penalty()
    assert [unit for unit, _ in seen] == [units[0], units[0], units[1]]
    ways = [((u.fitted.w * x + u.fitted.c).abs() - 1).clamp_min(0).amax(1) for u, x in seen]
    squares = [way.square().mean() for way in ways]
    torch.testing.assert_close(found, (squares[0] + squares[1]) / 2 + squares[2])


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_trained_as_any_other(in_place):
    losses = []
    for compiled in (False, True):
        model, teacher, x = polynomials(1, 2, times=3)
        if compiled and in_place:
            model.compile(backend="eager")
            teacher.compile(backend="eager")
        elif compiled:
            model, teacher = (torch.compile(m, backend="eager") for m in (model, teacher))
        model(x)  # compiled before there are hooks, which its code leaves out from then on
        losses += [list(distill(model, teacher, x.split(HELD_OUT), steps=3, variation=0.0))]
    assert losses[0] == losses[1]
