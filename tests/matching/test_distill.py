"""The original network teaches the converted one; and all gates at once."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import DistillWarning, convert, distill, match_targets, swap_targets
from transfer_surgery.matching.distilling.held_out import Examination
from transfer_surgery.units import gated_activations


def networks(match: bool = True) -> tuple[nn.Sequential, nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Identity(), nn.Linear(16, 3)
    )
    for _ in range(50):
        teacher(torch.randn(64, 4))  # statistics of the norm
    for parameter in teacher[4].parameters():
        parameter.data.mul_(5)  # answers far from uniform
    x = torch.randn(1024, 4)
    model = convert(copy.deepcopy(teacher), "sin", example_input=x)
    if match:
        match_targets(model, [x])
    return swap_targets(model), teacher, list(x.split(64))


def test_the_model_comes_nearer_to_its_teacher_which_does_not_change():
    model, teacher, batches = networks(match=False)
    before = copy.deepcopy(teacher.state_dict())
    gates = copy.deepcopy(model[2].gate.state_dict())
    model.eval()
    teacher.train()
    x = torch.randn(500, 4)

    def distance():
        with torch.no_grad():
            answers = [copy.deepcopy(m).eval()(x).softmax(1) for m in (model, teacher)]
        return (answers[0] - answers[1]).abs().mean().item()

    far = distance()
    found = distill(model, teacher, batches, steps=300, lr=0.02)
    assert len(found) == 300
    assert found.after["output"] < 0.3 * found.before["output"]
    assert distance() < 0.5 * far
    assert not model.training
    assert teacher.training
    assert_same_bits(teacher, before)
    assert torch.equal(model[2].gate.state_dict()["log_alpha"], gates["log_alpha"])
    assert all(p.requires_grad for p in model.parameters())


def test_targets_and_norms_alone_can_be_trained():
    model, teacher, batches = networks()
    model[2].fitted.b.data += 0.3
    before = copy.deepcopy(model.state_dict())
    distill(model, teacher, batches, steps=40, train="targets", lr=0.02)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert changed == statistics | {f"2.fitted.{n}" for n in "awcb"} | {"1.weight", "1.bias"}


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(4, affine=True), nn.RMSNorm(6)])
def test_norms_of_other_kinds_are_trained_with_the_targets(norm):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv1d(3, 4, 3), norm, nn.ReLU())
    x = list(torch.randn(64, 3, 8).split(16))
    model = swap_targets(convert(copy.deepcopy(teacher), "sin", example_input=x[0]))
    before = copy.deepcopy(model.state_dict())
    distill(model, teacher, x, steps=20, train="targets", lr=0.02)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"1.{name}" for name, _ in norm.named_parameters()}


PLAIN = {"features": (), "variation": 0.0}
"""Neither layers are compared nor inputs varied: the loss is that of the outputs."""


def first_loss(model, teacher, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillWarning)
        return distill(model, teacher, batches, steps=1, **PLAIN | options)[0]


def test_the_first_loss_is_the_softened_divergence():
    model, teacher, batches = networks()
    x = batches[0]
    with torch.no_grad():
        now = (copy.deepcopy(model).train()(x) / 2).double().softmax(1)
        wanted = (teacher.eval()(x) / 2).double().softmax(1)
    expected = 4 * (wanted * (wanted / now).log()).sum(1).mean().item()
    found = first_loss(model, teacher, batches, loss="kl", temperature=2.0)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_channel_that_hardly_varied_stays_smooth_when_it_is_trained():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(512, 8)
    teacher(x)
    with torch.no_grad():
        teacher[1].weight[:3], teacher[1].bias[:3] = 1e-5, 0.3
    model = convert(copy.deepcopy(teacher.eval()), "sin", example_input=x)
    match_targets(model, [x])
    model[3].bias.data += 0.3
    distill(swap_targets(model), teacher, list(x.split(64)), steps=50, lr=0.01)
    inputs = model[:2].eval()(x).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(model[2](inputs).sum(), inputs)
    assert slopes.abs().max() < 3  # of ReLU it is 1; fitted by its own deviation, 458


def test_features_are_compared_by_their_relative_error():
    model, teacher, batches = networks()
    x = batches[0]
    answers = [copy.deepcopy(m) for m in (model.train(), teacher.eval())]
    plain = first_loss(copy.deepcopy(model), teacher, batches)
    with torch.no_grad():
        errors = []
        for depth in (1, 3, 5):  # up to each linear layer, and up to the activation
            now, wanted = (m[:depth](x).double() for m in answers)
            errors.append((now - wanted).square().mean() / wanted.square().mean())
    chosen = first_loss(copy.deepcopy(model), teacher, batches, features=("0", "2"))
    assert chosen == pytest.approx(plain + sum(errors[:2]).item() / 2, rel=1e-4)
    layers = first_loss(copy.deepcopy(model), teacher, batches, features=None)
    assert layers == pytest.approx(plain + (errors[0] + errors[2]).item() / 2, rel=1e-4)
    assert not any(m._forward_hooks for net in (model, teacher) for m in net.modules())


def test_layers_are_compared_before_an_activation_in_place_writes_into_their_outputs():
    """The network that learns has no such activation any more."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)]
    teacher, x = nn.Sequential(*layers), torch.randn(64, 4)
    model = swap_targets(convert(copy.deepcopy(teacher), "sin", example_input=x))
    plain = first_loss(copy.deepcopy(model), teacher, [x])
    assert first_loss(model, teacher, [x], features=["0"]) == pytest.approx(plain)


def test_features_bring_the_inside_nearer_than_answers_alone():
    def distance(**options):
        model, teacher, batches = networks(match=False)
        distill(model, teacher, batches, steps=100, lr=0.02, **PLAIN | options)
        x = torch.cat(batches)
        with torch.no_grad():
            now, wanted = (m.eval()[:4](x) for m in (model, teacher))
        return (now - wanted).square().mean().item()

    assert distance(features=["3"]) < 0.9 * distance()


def test_wrong_arguments_are_refused():
    model, teacher, batches = networks()
    with pytest.raises(ValueError, match="use 'all' or 'targets'"):
        distill(model, teacher, batches, steps=1, train="norms")
    with pytest.raises(ValueError, match="use positive ones"):
        distill(model, teacher, batches, steps=0)
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="batches: there are none"):
            distill(model, teacher, nothing, steps=1, loss="kl")
    with pytest.raises(ValueError, match="none after 16 of 17 steps"):
        distill(model, teacher, iter(batches), steps=17)
    with pytest.raises(ValueError, match="look for NaN in the batches"):
        distill(model, teacher, [x * math.inf for x in batches], steps=1)
    with pytest.raises(ValueError, match="variation=2: use a number from 0 to 1"):
        distill(model, teacher, batches, steps=1, variation=2)
    with pytest.raises(ValueError, match=r"features=\['layer9'\]: Sequential has no such modules"):
        distill(model, teacher, batches, steps=1, features=["2", "layer9"])
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="call convert"):
        distill(teacher, teacher, batches, steps=1)
    unswapped = convert(copy.deepcopy(teacher), "sin", example_input=batches[0])
    with pytest.raises(ValueError, match=r"call swap_targets\(model\) first"):
        distill(unswapped, teacher, batches, steps=1)


@pytest.mark.parametrize("gate", ["hard_concrete", "bernoulli", "line", "copy"])
def test_gates_of_every_kind_are_swapped_where_asked(gate):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    convert(model, example_input=torch.zeros(1, 3), gate=gate)
    swap_targets(model, include="2")
    found = {path: unit.gate.predict().mean().item() for path, unit in gated_activations(model)}
    assert found == {"1": 1.0, "2.1": 0.0}
    swap_targets(model, exclude=lambda unit: unit.path == "2.1")
    x = torch.randn(5, 3)
    expected = model[2][0](model[0](x).sin()).sin()
    torch.testing.assert_close(model.eval()(x), expected)
    with pytest.raises(ValueError, match="no site is left"):
        swap_targets(model, exclude="*")


def test_what_is_not_better_on_held_out_inputs_is_not_kept_and_is_said():
    model, teacher, batches = networks()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(DistillWarning, match="did not bring the outputs nearer"):
        report = distill(model, teacher, batches, steps=20, lr=10.0)
    assert report.kept == 0
    assert report.after == report.before
    assert_same_bits(model, before)


@pytest.mark.parametrize(("momentum", "frozen"), [(0.0, False), (None, False), (0.1, True)])
def test_norms_that_cannot_follow_and_frozen_ones_are_held(momentum, frozen):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 2)]
    teacher, x = nn.Sequential(*layers).eval(), torch.randn(512, 4)
    with torch.no_grad():
        teacher[2].running_mean += 3
    model = swap_targets(convert(copy.deepcopy(teacher), "sin", example_input=x))
    model[2].requires_grad_(not frozen)
    report = distill(model, teacher, list(x.split(32)), steps=60, lr=0.02)
    assert report.after["output"] < 0.5 * report.before["output"]
    assert torch.equal(model[2].running_mean, teacher[2].running_mean)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 3).expand(2, 3),
        torch.tensor([[1.0, math.nan, 2.0]]).expand(2, 3),
        torch.eye(3).to_sparse(),
    ],
)
def test_buffers_that_are_expanded_or_sparse_stay(mask):
    """The first two cannot be written to, the third cannot be compared."""
    model, teacher, batches = networks(match=False)
    for network in (model, teacher):
        network.register_buffer("mask", mask)
    report = distill(model, teacher, batches, steps=20, lr=0.02)
    assert report.after["output"] < report.before["output"]
    torch.testing.assert_close(
        model.mask.to_dense(), mask.to_dense(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
@pytest.mark.parametrize("steps", [7, 39])
def test_the_network_is_looked_at_twenty_times_at_most(steps, monkeypatch):
    looks = []
    look = Examination.look
    monkeypatch.setattr(
        Examination, "look", lambda self, step: looks.append(step) or look(self, step)
    )
    model, teacher, batches = networks()
    distill(model, teacher, batches, steps=steps)
    assert looks[0] == 0  # the start
    assert looks[-1] == steps
    assert len(looks) == 1 + min(steps, 20)
