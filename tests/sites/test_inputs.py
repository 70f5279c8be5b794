"""Inputs, outputs and dtypes of every kind; and what gets gates, and what does not."""

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tests.helpers.promises import Body, X, assert_every_promise, assert_refused, units
from transfer_surgery import convert, find_activations, report

# Inputs, outputs, dtypes


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Record:
    x: Any


class Returning(Body):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        y = super().forward(x)
        match self.kind:
            case "dict":
                return {"y": y, "nested": [y, {"x": x}]}
            case "named tuple":
                return Point(x, y)
            case "dataclass":
                return Record(y)
        return y, [x]


@pytest.mark.parametrize("kind", ["dict", "named tuple", "dataclass", "tuple"])
def test_outputs_keep_their_type(kind):
    model = Returning(kind)
    expected = type(model(X))
    assert type(assert_every_promise(model, X)(X)) is expected


class Taking(nn.Module):
    """Takes anything that `read` turns into a tensor."""

    def __init__(self, read):
        super().__init__()
        self.read, self.linear = read, nn.Linear(4, 4)

    def forward(self, *args, **kwargs):
        return F.gelu(self.linear(self.read(*args, **kwargs)))


def _nested_dict(batch):
    return batch["images"][0] + batch["extra"]["mask"] * batch["scale"]


def _nested_tuple(pair, z):
    return pair[0] + pair[1][0] + z


def _list(xs):
    return xs[0] + xs[1]


def _keywords(x, *, y, **options):
    return x + y * options["scale"]


def _point(point):
    return point.x + point.y


@pytest.mark.parametrize(
    ("read", "args", "kwargs", "example"),
    [
        (_nested_dict, ({"images": [X], "extra": {"mask": X}, "scale": 2},), {}, None),
        (_nested_tuple, ((X, [X, X]), X), {}, None),
        (_list, ([X, X],), {}, [X, X]),
        (_keywords, (), {"x": X, "y": X, "scale": 2.0}, None),
        (_point, (Point(X, X),), {}, Point(X, X)),
    ],
)
def test_inputs_may_be_nested_and_named(read, args, kwargs, example):
    assert_every_promise(Taking(read), *args, example=example, **kwargs)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.linear = nn.LSTM(4, 4), nn.Linear(4, 4)

    def forward(self, packed):
        output = self.lstm(packed)[0]
        return output._replace(data=F.gelu(self.linear(output.data)))


@pytest.mark.parametrize("lengths", [(3, 2), (1,)])
def test_packed_sequences_go_in_and_come_out(lengths):
    packed = pack_sequence([torch.randn(length, 4) for length in lengths])
    model = assert_every_promise(Recurrent(), packed, example=packed)
    assert type(model(packed)) is PackedSequence


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=layout)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert_refused(model, ValueError, "nested tensor.* Pass a padded one", example=nested)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_precisions_keep_it_and_their_gates_stay_float32(dtype):
    model = assert_every_promise(Body().to(dtype), X.to(dtype))
    assert {unit.log_alpha.dtype for unit in units(model).values()} == {torch.float32}
    assert model.linear.weight.dtype is dtype


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_activations_of_numbers_that_gates_cannot_mix_are_listed_and_stay(dtype):
    class Mixed(nn.Module):
        def forward(self, x):
            y = torch.tanh(x) if x.is_complex() else torch.relu(x)
            return torch.selu(y.abs().float())

    model = Mixed()
    reasons = [site.reason for site in find_activations(model, X.to(dtype))]
    assert reasons == [f"its input is {dtype}", None]
    assert list(units(convert(model, example_input=X.to(dtype)))) == ["selu_0"]


def test_frozen_and_inference_parameters_stay_so_and_gates_are_trainable():
    with torch.inference_mode():
        inference = Body()
    for model in (Body().requires_grad_(False), inference):
        frozen = {key: p.requires_grad for key, p in model.named_parameters()}
        assert_every_promise(model, X)
        gates = {key: p for key, p in model.named_parameters() if key not in frozen}
        assert all(p.requires_grad and not p.is_inference() for p in gates.values())
        assert {key: p.requires_grad for key, p in model.named_parameters() if key in frozen} == (
            frozen
        )


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(F.relu(self.embedding(tokens)))

    tokens = torch.tensor([[1, 2, 3], [4, 0, 1]])
    model = assert_every_promise(Tied(), tokens, copies=(copy.deepcopy,))
    assert model.head.weight is model.embedding.weight


class AddRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.add = nn.Linear(4, 4), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.add.add_relu(x, self.linear(x))


def test_the_relu_inside_a_float_functional_is_converted():
    assert_every_promise(AddRelu(), X)


# What gets gates, and what does not


def test_a_shared_block_gets_one_set_of_gates_however_often_it_runs():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.alias = Body()
            self.loop = Body()

        def forward(self, x):
            x = self.alias(self.first(x))
            for _ in range(3):
                x = self.loop(x)
            return x

    model = assert_every_promise(Loop(), X, copies=(copy.deepcopy,))
    assert model.first is model.alias
    assert [row.path for row in report(model).rows] == [
        f"{block}.{unit}" for block in ("first", "loop") for unit in ("act_0", "gelu_0", "act_1")
    ]


def test_modules_that_never_run_get_no_gates():
    model = Body()
    model.unused, model.unused_body = nn.ReLU(), Body()
    assert_every_promise(model, X)
    assert type(model.unused) is nn.ReLU
    assert not units(model.unused_body)


def test_activations_that_do_not_depend_on_the_input_are_listed_and_stay():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 4))
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return F.gelu(x + self.mlp(self.table))

    plan = find_activations(Positions(), X)
    assert plan["mlp.1"].reason == "it does not depend on the input"
    model = assert_every_promise(Positions(), X, copies=(copy.deepcopy,))
    assert type(model.mlp[1]) is nn.ReLU


def test_the_model_may_be_an_activation_itself():
    assert_every_promise(nn.ReLU(), X)


def test_tensors_whose_first_axes_mean_different_things_are_taken_as_they_are():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.act = nn.GRU(4, 6, batch_first=True), nn.ReLU()

        def forward(self, x, h0):
            return self.act(self.gru(x, h0)[0])

    plan = find_activations(Recurrent(), (torch.zeros(1, 5, 4), torch.zeros(1, 1, 6)))
    assert [str(site.source) for site in plan] == ["gru", "relu"]
