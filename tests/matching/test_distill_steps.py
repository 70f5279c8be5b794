"""What one step of distill compares, and how its training ends."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import convert, distill, match_targets, swap_targets

no_gain = pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
"""So few steps need not help."""


class Branching(nn.Module):
    """A network with a layer that some batches do not come to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.within, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.norm = nn.ReLU(), nn.BatchNorm1d(8)

    def forward(self, x, deep=True):
        x = self.norm(input=self.act(self.first(x)))
        return self.last(self.within(x).tanh() if deep else x)


def networks(network, example):
    torch.manual_seed(0)
    teacher = network.eval()
    model = convert(copy.deepcopy(teacher), "sin", example_input=example)
    match_targets(model, [example])
    return swap_targets(model), teacher


def nothing(now, wanted):
    return 0 * now.sum()


def layers_alone(model, teacher, batches, steps, **options):
    options = {"loss": nothing, "variation": 0.0, "lr": 1e-9} | options
    return list(distill(model, teacher, batches, steps=steps, **options))


@no_gain
def test_a_layer_is_compared_only_in_the_batches_that_come_to_it():
    x = torch.randn(8, 32, 5, generator=torch.Generator().manual_seed(0))
    batches = [(part, number in (0, 7)) for number, part in enumerate(x)]
    found = layers_alone(*networks(Branching(), x[0]), batches, 7, features=["within"])
    assert found[0] > 0
    assert found[1:] == [0.0] * 6


def test_batches_of_which_some_do_not_come_to_a_layer_are_learned_from():
    x = torch.randn(8, 32, 5, generator=torch.Generator().manual_seed(0))
    batches = [(part, number % 2 == 0) for number, part in enumerate(x)]
    network = Branching()
    network.norm.momentum = 0.0
    report = distill(*networks(network, x[0]), batches, steps=60)
    assert report.after["output"] < 0.95 * report.before["output"]


def test_features_that_cannot_be_compared_are_refused_before_anything_is_changed():
    x = torch.randn(8, 32, 5)
    batches = [(part, False) for part in x]
    model, teacher = networks(Branching(), x[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="within of the model does not run on the held-out"):
        distill(model, teacher, batches, steps=3, features=["within"])
    teacher.act = nn.Sequential(nn.ReLU(), nn.Unflatten(-1, (2, 4)))
    teacher.norm.forward = lambda input: input.flatten(-2)
    with pytest.raises(ValueError, match=r"act returns \(32, 8\) and \(32, 2, 4\) in the model"):
        distill(model, teacher, list(x), steps=3, features=["act"])
    assert_same_bits(model, before)


@no_gain
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_inside_of_compiled_functions_are_compared(compiled):
    torch.compiler.reset()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = nn.Linear(8, 8), nn.ReLU()

        def forward(self, x):
            return self.act(self.inner(x))

    if compiled:
        Block.forward = torch.compile(Block.forward, backend="eager")
    torch.manual_seed(0)
    x = torch.randn(256, 5)
    model, teacher = networks(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Block()), x)
    for network in (model, teacher):  # compiled before there are hooks
        network(x)
    (error,) = layers_alone(model, teacher, [x], 1, features=["2.inner"])
    with torch.no_grad():
        now, wanted = (network[2].inner(network[:2](x)) for network in (model, teacher))
    expected = (now - wanted).square().mean() / wanted.square().mean()
    assert expected > 1e-4
    assert error == pytest.approx(expected.item(), rel=1e-4)


class Stopped(list):
    """Batches that end with an error."""

    def __init__(self, batches, error):
        super().__init__(batches)
        self.error = error

    def __iter__(self):
        yield from super().__iter__()
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk")])
def test_an_error_ends_with_the_best_state(error):
    x = list(torch.randn(4, 32, 5))
    model, teacher = networks(Branching(), x[0])
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(type(error)):
        distill(model, teacher, Stopped(x, error), steps=2000, lr=1.0)
    assert_same_bits(model, before)  # four steps of 2000 come to no look
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@no_gain
def test_a_norm_that_cannot_learn_from_a_batch_is_explained():
    x = torch.randn(4, 32, 5)
    model, teacher = networks(Branching(), x[0])
    before = copy.deepcopy(model.state_dict())
    batches = [*x, x[0, :1]]
    with pytest.raises(
        ValueError, match=r"^norm: this BatchNorm1d .* single value .*drop_last=True"
    ):
        distill(model, teacher, batches, steps=5)
    assert_same_bits(model, before)
    model.norm.momentum = 0.0
    assert len(distill(model, teacher, batches, steps=5)) == 5


def test_a_teacher_that_would_learn_too_is_refused():
    x = torch.randn(4, 32, 5)
    model, teacher = networks(Branching(), x[0])
    teacher.last = model.last
    for wrong in (model, teacher):
        with pytest.raises(ValueError, match="the teacher has parameters of the model"):
            distill(model, wrong, list(x), steps=1)


def test_parameters_that_are_nan_are_named():
    x = torch.randn(4, 32, 5)
    model, teacher = networks(Branching(), x[0])
    model.last.weight.data[0, 0] = torch.nan
    model.norm.running_var[3] = torch.nan
    with pytest.raises(ValueError, match=r"^last.weight, norm.running_var hold NaN or infinite"):
        distill(model, teacher, list(x), steps=1)


class Growing(nn.Module):
    """A table that grows with the longest input, and one that the first forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)
        self.register_buffer("places", torch.zeros(2), persistent=False)

    def forward(self, x):
        if x.shape[1] > len(self.places):
            self.places = torch.arange(x.shape[1]) / 9.0
        if self.training or x.shape[1] > 5:
            self.register_buffer("late", torch.ones(1), persistent=False)
        return self.last(self.act(self.first(x) + self.places[: x.shape[1], None]))


@no_gain
def test_tables_that_grow_or_come_while_training_do_not_end_it():
    batches = [torch.randn(16, length, 5) for length in (6, 7, 4)]
    model, teacher = networks(Growing(), torch.randn(16, 4, 5))
    model.last.weight.data += 1.0
    report = distill(model, teacher, [*batches[:2], *batches[2:] * 6], steps=40, lr=0.01)
    assert report.kept > 0
    assert model(batches[1]).isfinite().all()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_reentrant_checkpointing_hides_are_refused():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    x = torch.randn(64, 5)
    model, teacher = networks(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    model = nn.Sequential(model[0], Checkpointed(*model[1:]))
    teacher = nn.Sequential(teacher[0], Checkpointed(*teacher[1:]))
    with pytest.raises(RuntimeError, match=r"^1.1 runs inside of an autograd.Function"):
        distill(model, teacher, [x], steps=1)
