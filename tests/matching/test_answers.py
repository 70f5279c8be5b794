"""Outputs of any shape are read as classes: of texts, images, and a single logit."""

import copy
from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import convert, distill, match_targets, sensitivity, swap_targets
from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.answers import log_probabilities, logits_of
from transfer_surgery.matching.two_networks.site_gradients import site_calls
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), 1), ((4, 6, 5), 2), ((4, 5, 3, 2), 1), ((2, 5, 3, 2, 2), 1)]
)
def test_the_classes_of_each_shape(shape, axis):
    logits = torch.randn(shape, dtype=torch.float64)
    expected = (logits / 2).softmax(axis).log()
    found = log_probabilities(logits, temperature=2.0)
    assert found.dtype == torch.float64
    assert found.shape == (logits.numel() // 5, 5)
    torch.testing.assert_close(found, expected.movedim(axis, -1).reshape(-1, 5))


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 1), (7, 1, 1, 1)])
def test_one_logit_is_that_of_yes_against_no(shape):
    logits = torch.randn(7)
    found = log_probabilities(logits.reshape(shape))
    torch.testing.assert_close(found, torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], 1))


def test_half_precision_is_read_in_float32():
    assert log_probabilities(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_logits_are_found_by_their_name_or_as_the_first_floating_tensor():
    x, y = torch.zeros(2), torch.ones(2)
    assert logits_of({"loss": x, "logits": y}) is y
    assert logits_of((torch.zeros(2, dtype=torch.long), y, x)) is y
    with pytest.raises(TypeError, match="without a floating tensor"):
        logits_of([torch.zeros(2, dtype=torch.long)])


def test_tensors_are_found_in_whatever_holds_them_and_its_kind_stays():
    @dataclass(frozen=True, slots=True)
    class Frozen:
        x: torch.Tensor
        name: str = "frozen"

    class Pair(NamedTuple):
        x: torch.Tensor
        y: object

    class Node:
        def __init__(self) -> None:
            self.x, self.me, self.network = torch.ones(2), self, nn.Linear(1, 1)

    node = Node()
    value = {"a": [Pair(torch.ones(1), Frozen(torch.ones(3)))], "b": node, "c": UserDict(x=node.x)}
    found = map_tensors(lambda x: x + 1, value)
    (pair,) = found["a"]
    assert (type(pair), type(pair.y), pair.y.name) == (Pair, Frozen, "frozen")
    for tensor in (pair.x, pair.y.x, found["b"].x, found["c"]["x"]):
        assert (tensor == 2).all()
    assert (node.x == 1).all()
    assert found["b"].network is node.network
    assert map_tensors(lambda x: x, value) is value


class Text(nn.Module):
    """(N, tokens, features) -> {"logits": (N, tokens, 4)}, as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x):
        return {"logits": 4 * self.layers(x)}


def binary() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))


@pytest.mark.parametrize("make", [Text, binary])
def test_a_network_of_any_answers_is_measured_and_taught(make):
    torch.manual_seed(0)
    teacher, x = make(), torch.randn(64, 5, 3) if make is Text else torch.randn(256, 3)
    model, plain = (convert(copy.deepcopy(teacher), "sin", example_input=x) for _ in range(2))

    def divergence(student, x=x):
        with torch.no_grad():
            answers = [logits_of(network.eval()(x)).double() for network in (teacher, student)]
        if make is binary:
            answers = [torch.cat([torch.zeros_like(a), a], 1) for a in answers]
        wanted, now = (a.log_softmax(-1) for a in answers)
        return (wanted.exp() * (wanted - now)).sum(-1).mean().item()

    (row,) = sensitivity(model, [x], logits=True)
    (fit,) = match_targets(model, [x], logits=True)
    assert row.divergence == pytest.approx(divergence(swap_targets(plain)), rel=1e-4)
    half = x[: len(x) // 2]  # one site, one batch: the report compares half of the examples
    assert fit.divergence == pytest.approx(divergence(swap_targets(model), half), rel=1e-4)
    assert fit.divergence < row.divergence

    options = {"loss": "kl", "temperature": 1.0, "features": (), "variation": 0.0}
    losses = distill(plain, teacher, [x], steps=100, lr=0.01, **options)
    assert losses[0] == pytest.approx(row.divergence, rel=1e-4)
    assert divergence(plain) < 0.3 * row.divergence


def test_a_single_logit_has_fisher_information():
    torch.manual_seed(0)
    model = convert(binary(), "sin", example_input=torch.zeros(1, 3)).eval()
    unit, x = model[1], torch.randn(20, 3)
    (call,) = site_calls(TwoNetworks(model, [unit], [x]), [unit], x, seed=0, logits=True)[unit]
    slopes = call.squared_gradient
    p = model(x).sigmoid().detach()
    # d log p(label) / d logit is 1 - p where the label is yes, -p where it is no.
    yes, no = ((error * model[2].weight).square() for error in (1 - p, p))
    assert (torch.isclose(slopes, yes) | torch.isclose(slopes, no)).all()
    assert (slopes > 0).any()
