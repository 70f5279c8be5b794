"""What match_targets and its like are called with, and in which state of torch."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    MatchWarning,
    bake,
    convert,
    distill,
    fold_targets,
    match_targets,
    sensitivity,
    swap_activations,
    swap_targets,
)
from transfer_surgery.reports import plot_activation


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)]
    return convert(nn.Sequential(*layers), "sin", example_input=torch.zeros(1, 4))


X = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("refit", [False, True])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value, refit):
    model = network()
    before = copy.deepcopy(model.state_dict())
    batches = [X, X.clone()]
    batches[1][3, 2] = value
    with pytest.raises(ValueError, match=r"^1: NaN or infinity comes in"):
        match_targets(model, batches, refit=refit)
    assert_same_bits(model, before)


def test_sites_are_not_compared_by_outputs_that_are_not_finite():
    with pytest.raises(ValueError, match=r"^1: the outputs.* not finite"):
        sensitivity(network(), [X * torch.nan])


@pytest.mark.parametrize(
    ("batches", "complaint"),
    [
        ([X, X[:0]], r"no examples: shapes \[\(0, 4\)\]"),
        ([[X, X]], r"without labels.*\[images for images, _ in loader\]"),
        ([X.numpy()], "a batch is a ndarray"),
        ([], "there are none"),
    ],
)
def test_batches_that_cannot_be_used_are_named(batches, complaint):
    with pytest.raises(ValueError, match=complaint):
        match_targets(network(), batches)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (X[:, :3], r"float32 \(256, 3\) \(RuntimeError: .*256x3 and 4x8"),
        (X.double(), r"float64 \(256, 4\) \(RuntimeError: .* dtype"),
        ({"pixels": X}, r"with the keys pixels: float32 \(256, 4\) \(TypeError: .*'pixels'"),
    ],
)
@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda model, batches: match_targets(model, batches), r"batches\[1\]"),
        (lambda model, batches: swap_targets(model, keep=0.5, batches=batches), r"batches\[1\]"),
        (lambda model, batches: sensitivity(model, batches), r"batches\[1\]"),
        (
            lambda model, batches: distill(swap_targets(model), network(), batches, steps=1),
            "held-out batch 1",
        ),
        (
            lambda model, batches: distill(
                swap_targets(model), network(), [*batches, *6 * [X]], steps=9
            ),
            "the batch of step 2",
        ),
        (
            lambda _, batches: swap_activations(made(False), "sin", [X], held_out=batches),
            "held-out batch 1",
        ),
        (
            lambda model, batches: fold_targets(bake(swap_targets(model)), batches[1]),
            "the example input",
        ),
        (lambda model, batches: plot_activation(model, "1", batches=batches), r"batches\[1\]"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_named(use, name, batch, found):
    message = rf"^Sequential does not run on {name}.*{found}.* takes \(input\), .* are float32\."
    with pytest.raises(ValueError, match=message) as caught:
        use(network(), [X, batch])
    assert isinstance(caught.value.__cause__, RuntimeError | TypeError)


def test_a_handful_of_examples_draws_a_warning():
    with pytest.warns(MatchWarning, match=r"fewer than 30 values at 1 .*, 3 .*: .* more examples"):
        found = match_targets(network(), [X[:20]])
    assert [row.values for row in found] == [20, 20]
    assert [row.values for row in match_targets(network(), X.split(64))] == [256, 256]


class Positive(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[x[:, 0] > 0])


def test_batches_of_which_nothing_comes_to_a_site_change_nothing():
    torch.manual_seed(0)
    x = torch.randn(128, 4)
    none = x.clone()
    none[:, 0] = -1
    base = Positive(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = []
    for batches in ([x], [x, none], [none]):
        model = convert(copy.deepcopy(base), "polynomial", example_input=x)
        row = match_targets(model, batches, refit=True).rows[0]
        found.append((row.r2 and round(row.r2, 6), row.range, row.values))
    assert found[0] == found[1]
    assert found[2] == (None, None, None)


class Named(nn.Module):
    """Gives its activation the input by name."""

    def __init__(self):
        super().__init__()
        self.body, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.act(input=self.body(x)))


def test_activations_that_get_their_input_by_name_are_seen_as_others_are():
    model = convert(Named(), "polynomial(degree=2)", example_input=X)
    match_targets(model, [X], weights="gradient", refit=True)
    swap_targets(model, keep=0.5, batches=[X])
    distill(model, Named(), [X], steps=20, lr=0.01)
    assert plot_activation(model, "act", [X]).get_lines()


def test_in_inference_mode_the_targets_can_be_trained_later():
    model = network()
    with torch.inference_mode():
        match_targets(model, [X], refit=True)
        sensitivity(model, [X])
    swap_targets(model)(X).square().sum().backward()
    assert model[1].fitted.a.grad.abs().sum() > 0


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        with torch.inference_mode(self.count.is_inference()):
            self.count.add_(1)
        return self.layers(x)


def test_what_was_made_in_inference_mode_is_as_it_was_afterwards():
    with torch.inference_mode():
        model = Counts()
    match_targets(convert(model, example_input=X), [X], refit=True)
    assert model.count == 0


def made(inference):
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)]
        return nn.Sequential(*layers, nn.GELU(), nn.Linear(8, 3)).eval()


def swapped(inference):
    model = convert(made(inference), "sin", example_input=X)
    match_targets(model, [X], refit=True)
    return swap_targets(model)


def test_a_network_made_in_inference_mode_is_refitted_and_folded_as_any_other():
    expected, model = swapped(False), swapped(True)
    assert_same_bits(expected, model)
    for network_ in (expected, model):
        fold_targets(bake(network_), X)
    assert_same_bits(expected, model)


@pytest.mark.parametrize(
    ("make", "learn"),
    [
        (swapped, lambda model: distill(model, network(), [X], steps=1)),
        (swapped, lambda model: swap_targets(model, keep=0.5, batches=[X])),
        (swapped, lambda model: match_targets(model, [X], weights="gradient")),
        (made, lambda model: swap_activations(model, "sin", X.split(64), distill_steps=1)),
    ],
)
def test_what_needs_gradients_names_a_way_out_of_inference_mode_that_works(make, learn):
    model = make(True)
    with pytest.raises(ValueError, match=r"^0\.weight was made in .* copy\.deepcopy\(model\)"):
        learn(model)
    with warnings.catch_warnings(action="ignore"):  # one step is not enough
        learn(copy.deepcopy(model))


@pytest.mark.parametrize("in_place", [False, True])
def test_of_a_compiled_model_the_same_is_found(in_place):
    plain, model = network(), network()
    expected = match_targets(plain, [X])
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(X)  # compiled before there are hooks, which its code leaves out from then on
    assert [row.r2 for row in match_targets(compiled, [X])] == [row.r2 for row in expected]
    costs = [[row.cost for row in sensitivity(m, [X])] for m in (compiled, plain)]
    assert costs[0] == costs[1]


def test_afterwards_compiled_modules_are_compiled_again():
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    layer = torch.compile(nn.Linear(4, 4), backend=backend)
    match_targets(network(), [X])
    layer(X)
    assert runs == [1]
