"""Numbers of matched targets move into neighbouring layers: where it is exact, and only there."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import nn
from torch.nn.utils import prune

from tests.helpers.folding import IMAGES, folded, images, matched
from transfer_surgery import fold_targets
from transfer_surgery.activations import ActivationModule
from transfer_surgery.units import FittedActivation

pytestmark = pytest.mark.filterwarnings("ignore:a gate saw fewer")  # a few images will do here


@pytest.mark.parametrize(
    ("behind", "left"),
    [
        (nn.Conv2d(6, 6, 3), ""),
        (nn.Conv2d(6, 6, 3, bias=False), ""),
        (nn.Conv2d(6, 6, 3, padding="valid"), ""),
        (nn.Conv2d(6, 6, 1, padding="same"), ""),
        (nn.Conv2d(6, 6, 3, padding="same"), "b"),
        (nn.Conv2d(6, 6, 3, padding=1), "b"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), "b"),
        (nn.Conv2d(6, 6, 3, groups=6), ""),
        (nn.Conv2d(6, 4, 3, groups=2, stride=2, bias=False), ""),
        (nn.Conv2d(6, 4, 3, groups=2, padding=1), "b"),
    ],
    ids=str,
)
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_convolutions_take_what_is_exact(behind, left, granularity):
    model = matched(images(copy.deepcopy(behind)), IMAGES, granularity=granularity)
    assert folded(model, IMAGES) == [("0", "2", left)]
    assert isinstance(model[1], ActivationModule if not left else FittedActivation)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1, bias=False)],
    ids=lambda m: type(m).__name__,
)
def test_norms_take_frequency_and_phase(norm):
    model = matched(images(nn.Conv2d(6, 6, 3), before=(copy.deepcopy(norm),)), IMAGES)
    assert folded(model, IMAGES) == [("1", "3", "")]
    assert str(model[2]) == "ActivationModule(sin)"


@pytest.mark.parametrize("norm", [BatchNormAct2d(6), GroupNormAct(6, 2)], ids=str)
def test_norms_that_hold_their_activation_take_them_too(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), copy.deepcopy(norm), nn.Conv2d(6, 5, 3), nn.Flatten())
    model = matched(model, IMAGES)
    assert folded(model, IMAGES) == [("1", "2", "")]
    assert str(model[1].act) == "ActivationModule(sin)"


class Doubled(BatchNormAct2d):
    """Does something between its norm and its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Hardtanh()


def test_what_stands_between_a_norm_and_its_activation_forbids_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Doubled(6), nn.Conv2d(6, 5, 3), nn.Flatten())
    model = matched(model, IMAGES, source="relu")
    assert folded(model, IMAGES) == [("(no layer there)", "2", "w, c")]


def test_tokens_go_through_linear_layers_and_layer_norms():
    torch.manual_seed(0)
    tokens = torch.randn(4, 5, 8)
    layers = [nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 8)]
    model = matched(nn.Sequential(*layers), tokens)
    assert folded(model, tokens) == [("1", "4", "")]


@pytest.mark.parametrize("target", ["sin", "square", "hardswish"])
def test_a_number_per_neuron_is_one_per_channel_of_a_linear_layer(target):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    layers = [nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)]
    model = matched(nn.Sequential(*layers), x, target, granularity="neuron")
    assert folded(model, x) == [("0", "2", "")]
    assert {"0.bias", "2.bias"} <= set(model.state_dict())


def test_a_number_per_neuron_of_an_image_stays():
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES, granularity="neuron")
    assert folded(model, IMAGES) == [("(0 has another axis)", "(2 has another axis)", "a, w, c, b")]


def test_a_channel_with_almost_no_amplitude_keeps_its_constant():
    model = matched(images(nn.Conv2d(6, 6, 3, padding=1)), IMAGES)
    model[1].a.data[2] = 1e-9
    model[1].a.data[3] = 0.0
    assert folded(model, IMAGES) == [("0", "2", "a, b")]
    rest = model[1].a
    assert torch.equal(rest[[0, 1, 4, 5]], torch.ones(4))
    assert (rest[[2, 3]] < 1e-6).all()


def test_a_channel_without_amplitude_and_offset_leaves_no_number():
    model = matched(images(nn.Conv2d(6, 6, 3, padding=1)), IMAGES, "relu6")
    model[1].b.data.zero_()
    model[1].a.data[3] = 0.0
    assert folded(model, IMAGES) == [("0", "2", "")]
    assert type(model[1]) is nn.ReLU6
    assert not model[2].weight[:, 3].any()


class Between(nn.Module):
    """An activation between two layers, and what else reads its tensors, layers and numbers."""

    def __init__(self, read: Callable[..., Any] = lambda model, y, z, out: out) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.one, self.act, self.two = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.one(x)
        z = self.act(y)
        return self.read(self, y, z, self.two(z))


class ByKeyword(Between):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(input=self.act(self.one(input=x)))


SEVERAL, ELSEWHERE = "(several readers)", "(one has parameters that are read elsewhere)"
FEATURES = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def assert_neighbours(model: nn.Module, before: str, after: str) -> None:
    model = matched(model, FEATURES)
    with torch.no_grad():
        expected = model(FEATURES)
        row = fold_targets(model, FEATURES[:2]).rows[0]
        torch.testing.assert_close(model(FEATURES), expected, rtol=1e-4, atol=1e-4)
    assert (row.before, row.after) == (before, after)


@pytest.mark.parametrize(
    ("read", "before", "after"),
    [
        (lambda model, y, z, out: out, "one", "two"),
        (lambda model, y, z, out: out + y, SEVERAL, "two"),
        (lambda model, y, z, out: out + y.view(-1, 4)[:, :1], SEVERAL, "two"),
        (lambda model, y, z, out: out + z, "one", SEVERAL),
        (lambda model, y, z, out: out + z.mul_(2), "one", SEVERAL),
        (lambda model, y, z, out: (out, z), "one", SEVERAL),
        (lambda model, y, z, out: model.two(out), "one", "(two is shared)"),
        (lambda model, y, z, out: F.linear(out, model.one.weight), ELSEWHERE, "two"),
        (lambda model, y, z, out: out @ model.one.weight.T, ELSEWHERE, "two"),
        (lambda model, y, z, out: out + model.one.bias.data, ELSEWHERE, "two"),
        (
            lambda model, y, z, out: out * getattr(model.act, "w", 1),
            *["(its numbers are shared)"] * 2,
        ),
    ],
)
def test_a_second_reader_or_call_forbids_it(read, before, after):
    assert_neighbours(Between(read), before, after)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (lambda m: setattr(m.two, "weight", m.one.weight), "(one is shared)", "(two is shared)"),
        (
            lambda m: setattr(m.two, "weight", nn.Parameter(m.one.weight.data)),
            *("(one is shared)", "(two is shared)"),
        ),
        (lambda m: setattr(m, "transposed", m.one.weight.data.T), "(one is shared)", "two"),
        (lambda m: m.one.weight.requires_grad_(False), "(one is frozen)", "two"),
        (lambda m: prune.identity(m.one, "weight"), "(one has a computed weight)", "two"),
        (
            lambda m: m.one.register_forward_hook(lambda m, args, y: y.clamp(max=1e6)),
            *("(one has hooks)", "two"),
        ),
        (
            lambda m: m.act.register_forward_hook(lambda m, args, y: None),
            *["(the site has hooks)"] * 2,
        ),
    ],
)
def test_weights_that_are_not_the_layers_own_and_plain_forbid_it(change, before, after):
    model = Between()
    change(model)
    assert_neighbours(model, before, after)


def test_layers_may_be_called_by_keyword():
    assert_neighbours(ByKeyword(), "one", "two")


@pytest.mark.parametrize(
    ("target", "sign", "left"),
    [
        ("relu", 1, "b"),
        ("leaky_relu", 1, "b"),
        ("relu", -1, "a, b"),
        ("relu6", 1, "a, b"),
        ("hardswish", 1, "a, b"),
        ("polynomial", 1, "a, b"),
    ],
)
def test_a_positive_amplitude_goes_in_front_of_a_relu_with_several_readers(target, sign, left):
    network = Between(lambda model, y, z, out: out + z)
    network.act = nn.SiLU()
    model = matched(network, FEATURES, target)
    model.act.a.data.abs_().mul_(sign)
    assert folded(model, FEATURES) == [("one", SEVERAL, left)]


def test_a_block_that_is_called_twice_is_folded_once():
    block = Between()
    model = matched(nn.Sequential(block, block), FEATURES)
    assert folded(model, FEATURES) == [("0.one", "0.two", "")]


class Levels(nn.Module):
    """A head that is called for two scales; each scale has a last layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        layers = nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1), nn.SiLU()
        self.head = nn.Sequential(*layers)
        self.outs = nn.ModuleList(nn.Conv2d(6, 2, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        levels = [
            out(self.head(y)).flatten(1)
            for y, out in zip((x, x[..., ::2, ::2]), self.outs, strict=True)
        ]
        return torch.cat(levels, 1)


def test_a_head_that_is_called_for_several_scales_takes_what_all_calls_have():
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = matched(Levels(), x, "relu")
    for site in (model.head[1], model.head[3]):
        site.a.data.abs_()
        site.b.data.zero_()
    model.head[3].a.data[0] = -1.0
    expected = [("head.0", "head.2", ""), ("head.2", "(several layers)", "a")]
    assert folded(model, x) == expected
    assert type(model.head[1]) is nn.ReLU


@pytest.mark.parametrize(
    ("name", "all_gone"),
    [("test_resnet", False), ("test_vit", True), ("test_convnext", True), ("test_efficientnet", 0)],
)
def test_timm_models(name, all_gone):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 160, 160)
    model = matched(timm.create_model(name), x)
    found = folded(model, x, share=5e-3)  # sine networks of random weights amplify rounding
    assert all_gone == all(left == "" for *_, left in found)
    assert any(left != "a, w, c, b" for *_, left in found)
    assert any(isinstance(m, FittedActivation) for m in model.modules()) != all_gone


def test_a_site_that_passes_tensors_of_its_source_goes_on_doing_so():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2))
    model = matched(model, x, "hardswish")
    assert folded(model, x) == [("0", "2", "")]


def test_a_second_fold_changes_nothing():
    model = matched(images(nn.Conv2d(6, 6, 3, padding=1)), IMAGES)
    assert folded(model, IMAGES) == [("0", "2", "b")]
    assert [left for _, _, left in folded(model, IMAGES)] == ["b"]


class Quantized(torch.Tensor):
    """As torchao's weights are: a class of tensors of its own, which is a parameter."""


def test_weights_of_another_class_stay_as_they_are():
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES)
    weight = nn.Parameter(model[2].weight.detach().as_subclass(Quantized), requires_grad=False)
    model[2].weight = weight
    assert folded(model, IMAGES) == [("0", "(2 has a weight of class Quantized)", "a, b")]
    assert model[2].weight is weight
