"""Activations written by hand or with learned tensors: found whole, unchanged, convertible."""

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import assert_every_promise
from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import (
    bake,
    convert,
    find_activations,
    get_activation,
    register_activation,
    register_formula,
)
from transfer_surgery.activations import registry
from transfer_surgery.units import gated_activations


def _twice(x, product):
    return product(x, x)


# What a network does between two layers, the activation that it means, and its learned tensors.
WRITTEN = {
    "h * sigmoid(h)": (lambda m, h: h * torch.sigmoid(h), "silu"),
    "h.mul_(h.sigmoid())": (lambda m, h: h.mul_(h.sigmoid()), "silu"),
    "sigmoid(1.3 * h) * h": (lambda m, h: torch.sigmoid(1.3 * h) * h, "swish"),
    "h * sigmoid(1.702 * h)": (lambda m, h: h * torch.sigmoid(1.702 * h), "quick_gelu"),
    "h * sigmoid(v * h)": (lambda m, h: h * (m.v * h).sigmoid(), "parametric_swish"),
    "relu(h) ** 2": (lambda m, h: F.relu(h) ** 2, "squared_relu"),
    "square(act(h))": (lambda m, h: torch.square(m.act(h)), "squared_relu"),
    "r * r": (lambda m, h: _twice(m.act(h), torch.mul), "squared_relu"),
    "s * act(h) ** 2 + b": (lambda m, h: m.s * m.act(h) ** 2 + m.b, "star_relu"),
    "clamp(min=0)": (lambda m, h: h.clamp(min=0), "relu"),
    "clamp_min_(0)": (lambda m, h: h.clamp_min_(0), "relu"),
    "clamp(h, 0, 6)": (lambda m, h: torch.clamp(h, 0, 6), "relu6"),
    "maximum(h, zeros)": (lambda m, h: torch.maximum(h, torch.zeros_like(h)), "relu"),
    "max(h, zeros)": (lambda m, h: torch.max(h, h.new_zeros(())), "relu"),
    "maximum(h, v)": (lambda m, h: torch.maximum(h, m.v), "tlu"),
    "threshold(h, 0, 0)": (lambda m, h: F.threshold(h, 0, 0), "relu"),
    "threshold(h, 0.1, 0)": (lambda m, h: F.threshold(h, 0.1, 0.0), "threshold"),
    "prelu(h, v)": (lambda m, h: F.prelu(h, m.v), "prelu"),
    "h.mul(softplus(h).tanh())": (lambda m, h: h.mul(F.softplus(h).tanh()), "mish"),
    "h * relu6(h + 3) / 6": (lambda m, h: h * F.relu6(h + 3) / 6, "hardswish"),
    "h.mul(relu6(h + 3).div_(6))": (lambda m, h: h.mul(F.relu6(h + 3.0).div_(6.0)), "hardswish"),
    "gelu, tanh form": (
        lambda m, h: (
            0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))))
        ),
        "gelu",
    ),
    "gelu, erf form": (lambda m, h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))), "gelu"),
    "where(h >= 0, h, 0.2 * h)": (lambda m, h: torch.where(h >= 0, h, 0.2 * h), "leaky_relu"),
    "max(0.2 * h, h)": (lambda m, h: torch.max(0.2 * h, h), "leaky_relu"),
    "relu(h) - 0.2 * relu(-h)": (lambda m, h: F.relu(h) - 0.2 * F.relu(-h), "leaky_relu"),
    "h * mask": (lambda m, h: h * (h > 0).to(h.dtype), "relu"),
    "masked_fill": (lambda m, h: h.masked_fill(h < 0, 0.0), "relu"),
    "(h + |h|) / 2": (lambda m, h: 0.5 * (h + h.abs()), "relu"),
    "-minimum(-h, 0)": (lambda m, h: -torch.minimum(-h, torch.zeros_like(h)), "relu"),
    "h / (1 + exp(-h))": (lambda m, h: h / (1 + torch.exp(-h)), "silu"),
    "log(1 + exp(h))": (lambda m, h: torch.log(1 + h.exp()), "softplus"),
    "elu by where": (lambda m, h: torch.where(h > 0, h, 1.5 * torch.expm1(h)), "elu"),
    "h.where": (lambda m, h: (0.2 * h).where(h <= 0, h), "leaky_relu"),
    "h.where, by keyword": (lambda m, h: (0.2 * h).where(h <= 0, other=h), "leaky_relu"),
    "masked_fill, by keyword": (lambda m, h: h.masked_fill(h < 0, value=0.0), "relu"),
    "max(zeros, h)": (lambda m, h: torch.max(torch.zeros_like(h), h), "relu"),
    "h / (1 + exp(-1.5 * h))": (lambda m, h: h / (1 + torch.exp(-1.5 * h)), "swish"),
    "tanh by exp": (lambda m, h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()), "tanh"),
    "mish by log": (lambda m, h: h * torch.tanh(torch.log(1 + torch.exp(h))), "mish"),
    "snake of a frequency": (lambda m, h: h + (1 / 0.5) * torch.sin(0.5 * h).pow(2), "snake"),
    "h * clamp(h + 3, 0, 6) / 6": (lambda m, h: h * (h + 3).clamp(0, 6) / 6, "hardswish"),
    "h / (1 + |h|)": (lambda m, h: h / (1 + h.abs()), "softsign"),
    "a number of numpy's": (lambda m, h: torch.maximum(h, h * np.float64(0.2)), "leaky_relu"),
    "snake": (lambda m, h: h + torch.sin(h) ** 2, "snake"),
    "gelu, another tanh form": (
        lambda m, h: 0.5 * h * (1 + torch.tanh(0.797885 * (h + 0.044715 * h * h * h))),
        "gelu",
    ),
    "aten": (lambda m, h: torch.ops.aten.leaky_relu.default(h, 0.2), "leaky_relu"),
    "torch._C._nn": (lambda m, h: torch._C._nn.silu(h), "silu"),
    "silu of a relu": (lambda m, h: _twice(F.relu(h), lambda a, b: a * b.sigmoid()), "silu"),
}


class Net(nn.Module):
    """Two layers with something written by hand between them; not to be edited if it `walks`."""

    def __init__(self, written, walks):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(4, 6), nn.Linear(6, 3), nn.ReLU()
        self.v, self.s, self.b = (nn.Parameter(torch.randn(n)) for n in (6, 1, 1))
        self.written, self.walks = written, walks

    def forward(self, x):
        h = self.first(x)
        if self.walks:
            list(self.children())
        return self.last(WRITTEN[self.written][0](self, h))


# How a call is intercepted depends little on what is written: every fourth one, and in CI all.
INTERCEPTED = [
    pytest.param(written, True, marks=[pytest.mark.slow] if number % 4 else [])
    for number, written in enumerate(WRITTEN)
]


@pytest.mark.parametrize(
    ("written", "walks"), [*((written, False) for written in WRITTEN), *INTERCEPTED]
)
def test_a_hand_written_activation_is_one_site_and_converts_unchanged(written, walks):
    model, x = Net(written, walks), torch.randn(5, 4)
    site = find_activations(model, x).rows[-1]
    assert (site.source.name, site.role, site.shape) == (WRITTEN[written][1], "hidden", (5, 6))
    assert site.way == ("intercept" if walks or written == "r * r" else "edit")
    assert_same_runs(model, converted(model, x), x)
    assert_every_promise(model, x)


@pytest.mark.parametrize("written", WRITTEN)
def test_a_mixed_one_bakes_and_its_learned_tensors_stay_in_the_graph(written):
    model, x = Net(written, False), torch.randn(5, 4)
    convert(model.eval(), example_input=x)
    for _, unit in gated_activations(model):
        unit.log_alpha.data.copy_(torch.tensor([8.0, -8.0] * 3))
    assert torch.equal(bake(copy.deepcopy(model))(x), model(x))
    for _, unit in gated_activations(model):
        unit.log_alpha.data.fill_(-8.0)
    model.train()(x).sum().backward()  # DDP asks for a gradient
    if WRITTEN[written][1] in ("star_relu", "prelu", "tlu", "parametric_swish"):
        learned = model.s if WRITTEN[written][1] == "star_relu" else model.v
        assert torch.equal(learned.grad, torch.zeros_like(learned))


@pytest.mark.parametrize("written", ["h * sigmoid(h)", "s * act(h) ** 2 + b", "maximum(h, v)"])
def test_a_converted_formula_compiles_as_one_graph_and_exports(written):
    model, x = Net(written, False), torch.randn(5, 4)
    convert(model.eval(), example_input=x)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


OTHER = {
    "another gate": lambda m, h: h * torch.sigmoid(2 * h + 1),
    "the input has changed since": lambda m, h: _twice(h, lambda a, b: b.sigmoid() * a.add_(1)),
    "the gate is of something else": lambda m, h: h * torch.sigmoid(h.flip(-1)),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_only_resembles_a_formula_is_left_as_it_is(name, monkeypatch):
    monkeypatch.setitem(WRITTEN, name, (OTHER[name], "sigmoid"))
    model, x = Net(name, False), torch.randn(5, 4)
    assert [str(site.source) for site in find_activations(model, x)] == ["sigmoid"]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda m, h: torch.sin(30 * h), "sin(x * 30)"),
        (lambda m, h: torch.exp(-(h**2)), "exp(-x ** 2)"),
        (lambda m, h: h * 2 + (h * h + 4).sqrt(), "x * 2 + sqrt(x * x + 4)"),
    ],
)
def test_another_elementwise_formula_is_listed_once_and_says_how_it_is_made_known(
    function, text, monkeypatch
):
    monkeypatch.setitem(WRITTEN, text, (function, ""))
    model, x = Net(text, False), torch.randn(5, 4)
    (site,) = find_activations(model, x)
    assert (site.source.name, site.role, site.shape) == ("handwritten", "hidden", (5, 6))
    assert f"({text})" in site.reason
    with pytest.raises(ValueError, match="register_activation"):
        convert(model, example_input=x)


def test_norms_and_attention_by_hand_are_no_activations(monkeypatch):
    def norm(m, h):
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) + 0.1
        e = torch.exp(h - h.amax(-1, keepdim=True))
        return F.relu(e / e.sum(-1, keepdim=True) / (h.abs().sum(-1, keepdim=True) + 1))

    monkeypatch.setitem(WRITTEN, "norm", (norm, ""))
    assert [str(s.source) for s in find_activations(Net("norm", False), torch.randn(5, 4))] == [
        "relu"
    ]


def test_a_result_that_is_read_elsewhere_too_stays_a_site_of_its_own(monkeypatch):
    monkeypatch.setitem(
        WRITTEN, "r * r + r", (lambda m, h: _twice(F.relu(h), lambda a, b: a * b + a), "")
    )
    model, x = Net("r * r + r", False).eval(), torch.randn(5, 4)
    before = model(x)
    assert [s.source.name for s in find_activations(model, x)] == ["relu", "squared_relu"]
    assert torch.equal(convert(model, example_input=x)(x), before)


def test_a_clamp_of_coordinates_is_bounding_and_not_converted():
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 8), nn.ReLU()

        def forward(self, x):
            boxes = self.act(self.layer(x)).reshape(-1, 4)
            return boxes.clamp(0, 160), boxes.clamp(min=0), boxes.clamp(min=1e-6)

    plan = find_activations(Boxes(), torch.zeros(2, 4))
    assert [(s.source.name, s.role) for s in plan] == [
        ("relu", "hidden"),
        ("clamp", "bounding"),
        ("relu", "bounding"),
    ]
    assert list(convert(Boxes(), example_input=torch.zeros(2, 4)).act._modules) == ["gate"]


@pytest.mark.parametrize(
    ("name", "source", "sites"),
    [
        ("resnetv2_50d_evos", "parametric_swish", 51),
        ("resnetv2_50d_frn", "tlu", 51),
        pytest.param("caformer_s18", "star_relu", 24, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_activations_inside_norms_and_with_learned_tensors_are_found_in_timm(name, source, sites):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    plan = find_activations(model, x)
    assert sum(site.source.name == source for site in plan) == sites
    before, keys = model(x), set(model.state_dict())
    convert(model, plan=plan)
    assert torch.equal(model(x), before)
    assert keys < set(model.state_dict())


def test_an_activation_with_operands_is_refused_as_a_target():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with pytest.raises(ValueError, match="star_relu takes scale, bias from the site"):
        convert(model, target="star_relu", example_input=torch.zeros(1, 4))
    assert type(model[1]) is nn.ReLU


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no_such", "relu(x) ** 2", "unknown activation 'no_such'"),
        ("relu", "x * (x > 0)", "relu takes no operands: it is recognised by its values"),
        ("prelu", "weight", "expected an operation on weight, x"),
        ("prelu", "weight * x", r"has other values than prelu"),
        ("prelu", "gamma(x) * weight", r"cannot contain 'gamma\(x\)'; it may use"),
        ("prelu", "x % weight", "cannot contain 'x % weight'"),
        ("prelu", "x.weight * x", "cannot contain 'x.weight'"),
        ("prelu", "x * ", "invalid syntax"),
        ("prelu", "x * weight * 9 ** 9 ** 9", r"cannot contain '9 \*\* 9 \*\* 9'"),
    ],
)
def test_a_bad_formula_is_refused_with_what_is_possible(name, text, message):
    with pytest.raises(ValueError, match=message):
        register_formula(name, text)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.softplus(h) + 1e-6,  # what keeps a scale positive has to stay
        lambda h: 2 * torch.sigmoid(h + 1),
        lambda h: F.relu(h) * 3,
        lambda h: F.relu(h) + 0 * h,
        lambda h: 2 * F.relu(0.5 * h),
        lambda h: 2 * F.silu(0.5 * h),
    ],
)
def test_what_surrounds_an_activation_stays(function, monkeypatch):
    monkeypatch.setitem(WRITTEN, "surrounded", (lambda m, h: function(h), ""))
    model, x = Net("surrounded", False).eval(), torch.randn(5, 4)
    (site,) = (site for site in find_activations(model, x) if site.reason is None)
    assert site.kind == "function"
    original = copy.deepcopy(model)
    assert torch.equal(convert(model, example_input=x)(x), original(x))


def test_a_variant_that_was_found_in_another_process_is_read_from_its_text(monkeypatch):
    written, x = get_activation("silu(variant='x / (1.0 + exp(-x))')"), torch.tensor([-1.0, 2.0])
    expected, saved = written(x), pickle.dumps(written)
    monkeypatch.setattr(registry, "_VARIANTS", {})  # as in a new process
    again = pickle.loads(saved)
    assert again == written
    assert registry._VARIANTS
    assert torch.equal(again(x), expected)


def test_a_call_with_several_results_is_no_part_of_a_formula(monkeypatch):
    def boxes(m, h):
        rows, _ = torch.where(h.sigmoid() > 0.5)
        return F.relu(h) + rows.sum()

    monkeypatch.setitem(WRITTEN, "boxes", (boxes, ""))
    plan = find_activations(Net("boxes", False), torch.randn(5, 4))
    assert [site.source.name for site in plan] == ["sigmoid", "relu"]


@pytest.mark.usefixtures("own_registry")
def test_activations_without_readable_annotations_are_compared_all_the_same():
    def bell(x, width: "NoSuchName" = "narrow"):  # noqa: F821
        return torch.exp(-x * x)

    register_activation("test_bell")(bell)

    class Bell(nn.Linear):
        def forward(self, x):
            return torch.exp(-(super().forward(x) ** 2)).sin()

    plan = find_activations(Bell(4, 4), torch.randn(3, 4))
    assert "test_bell" in [site.source.name for site in plan]
