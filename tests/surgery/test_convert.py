"""Promises of convert, revert and bake on small hand-made networks: the hard cases, one each."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import assert_every_promise
from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import (
    GatedActivation,
    bake,
    convert,
    find_activations,
    report,
    revert,
)

X = torch.linspace(-3, 3, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = 0.5

    def forward(self, x, *, scale=1.0):
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        x = F.dropout(x, self.drop, self.training) * scale
        return x.tanh()

    def helper(self):
        return "kept"


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.two(self.relu(self.one(x))))


class ReadAgain(nn.Module):
    """The in-place activation's input is read after it was overwritten."""

    def __init__(self):
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.conv(x)
        y = self.act(h)
        return y + h


class OnlyWhenTraining(nn.Module):
    def forward(self, x):
        return F.gelu(x) if self.training else F.silu(x) + F.gelu(x)


class Untraceable(nn.Module):
    def forward(self, x):
        for _ in range(len(x.shape)):
            if x.sum() > -1e9:
                x = F.relu(x) - 0.1
        return x


class Alias(nn.Module):
    """One ReLU registered in two callers, which both call it."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 1), act)
        self.b = nn.Sequential(nn.Conv2d(4, 4, 1), act)

    def forward(self, x):
        return self.b(self.a(x))


MODELS = [Functional, Shared, ReadAgain, OnlyWhenTraining, Untraceable, Alias]


@pytest.fixture(params=MODELS, ids=lambda cls: cls.__name__)
def model(request):
    return request.param().eval()


@pytest.mark.parametrize("cls", [cls for cls in MODELS if cls is not OnlyWhenTraining])
def test_every_promise_is_kept_and_gates_are_all_that_is_new(cls):
    model = assert_every_promise(cls(), X)
    assert isinstance(model, cls)
    keys = [key for key in model.state_dict() if not key.endswith("gate.log_alpha")]
    assert keys == list(cls().state_dict())


def test_closed_gates_train_like_the_original_bit_for_bit(model):
    assert_same_runs(model, converted(model, X), X)


@pytest.mark.parametrize("exact", [True, False])
@torch.no_grad()
def test_mixed_sites_bake_to_the_eval_outputs(model, exact):
    convert(model, example_input=X)
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            parameter.copy_(torch.randn_like(parameter).sign() * 8 if exact else 0.0)
    before = model(X.clone())
    baked = bake(copy.deepcopy(model))
    torch.testing.assert_close(baked(X.clone()), before, rtol=0, atol=0 if exact else 1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(baked))(X.clone()), baked(X.clone()))


@torch.no_grad()
def test_a_transferred_in_place_call_shows_later_readers_the_new_value():
    model = convert(ReadAgain().eval(), example_input=X)
    model.act.log_alpha.fill_(-8.0)
    assert torch.equal(model(X), 2 * torch.sin(model.conv(X)))
    assert torch.equal(bake(model)(X), 2 * torch.sin(model.conv(X)))


@torch.no_grad()
def test_arguments_and_attributes_that_change_later_still_count():
    model = Functional().eval()
    before = model(X, scale=2.0)
    convert(model, example_input=X)
    assert torch.equal(model(X, scale=2.0), before)
    model.train()
    model.drop = 0.0
    expected = torch.tanh(torch.relu(model.bn(model.conv(X))))
    for unit in model.modules():
        if isinstance(unit, GatedActivation):
            unit.log_alpha.fill_(30.0)
    torch.testing.assert_close(model(X), expected)
    assert model.helper() == "kept"


@pytest.mark.parametrize(
    "how",
    [
        lambda model: {"example_input": X, "include": "a"},
        lambda model: {"plan": find_activations(model, X).filter(lambda s: s.path == "a.1")},
    ],
)
@torch.no_grad()
def test_converting_one_caller_of_a_shared_module_leaves_the_other_alone(how):
    model = Alias().eval()
    before = model(X)
    convert(model, **how(model))
    assert isinstance(model.a[1], GatedActivation)
    assert type(model.b[1]) is nn.ReLU
    assert torch.equal(model(X), before)


def test_finding_and_converting_leave_random_state_buffers_and_caches_alone():
    model = Functional().train()
    state, buffers = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    convert(model, example_input=X)
    assert torch.equal(state, torch.get_rng_state())
    for key, value in buffers.items():
        assert torch.equal(value, model.state_dict()[key])


def test_seed_decides_the_start_of_the_gates():
    starts = [
        convert(Shared(), example_input=X, seed=s).relu_0.log_alpha for s in (1, np.int64(1), 2)
    ]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "sine"}, "unknown activation 'sine'"),
        ({"granularity": "pixel"}, "unknown granularity 'pixel'"),
        ({"granularity": {"layer9*": "layer"}}, "matches none"),
        ({"granularity": {"relu_0": "layer"}}, "no granularity pattern matches"),
        ({"include": "layer9"}, "matches none"),
        ({"exclude": "layer9"}, "matches none"),
        ({"exclude": "*"}, "no activation left"),
        ({"source": "gelu"}, "matches none"),
        ({"target": "relu"}, "already"),
        ({"roles": "hiden"}, "unknown role"),
        ({"gate": "soft"}, "unknown gate"),
        ({"example_input": torch.zeros(1, 9, 5, 5)}, "does not run on the example input"),
        ({"example_input": ()}, "pass another example_input="),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_the_model_is_unchanged(arguments, message):
    model = Shared().eval()
    before, text, cls = model(X), repr(model), type(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **({"example_input": X} | arguments))
    assert type(model) is cls
    assert repr(model) == text
    assert torch.equal(model(X), before)


def test_models_unfit_for_surgery_are_refused():
    model = convert(Shared(), example_input=X)
    with pytest.raises(ValueError, match="revert"):
        convert(model, example_input=X)
    for verb in (revert, bake, report):
        with pytest.raises(ValueError, match="call convert"):
            verb(Shared())


def test_harden_rounds_gates_before_baking():
    model = convert(Shared().eval(), example_input=X)
    with torch.no_grad():
        model.relu_0.log_alpha.fill_(1.0)
        model.relu_1.log_alpha.fill_(-1.0)
        expected = torch.sin(model.two(torch.relu(model.one(X))))
        assert torch.equal(bake(model, harden=True)(X), expected)


def test_a_mixed_site_bakes_bit_for_bit_also_where_its_input_is_a_strided_view():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.joint, self.act, self.last = nn.Linear(16, 96), nn.GELU(), nn.Linear(64, 8)

        def forward(self, x):
            return self.last(self.act(self.joint(x).split([32, 64], dim=-1)[1]))

    model, x = Split(), torch.randn(2, 33, 16)
    convert(model.eval(), example_input=x)
    model.act.log_alpha.data.copy_(torch.randn(64).sign() * 8)
    with torch.no_grad():
        gated = model(x)
        assert torch.equal(bake(model)(x), gated)


def test_the_gates_of_a_baked_mixture_stay_float32_when_the_model_is_halved():
    model = convert(nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU()), example_input=X)
    model[1].log_alpha.data.copy_(torch.tensor([9.0, 0.1, -9.0]))
    expected = model[1].gate.predict()
    baked = bake(model).to(torch.bfloat16)
    assert torch.equal(baked[1].z, expected)
