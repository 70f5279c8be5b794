"""Numbers of matched targets move into neighbouring layers: where it is exact, and only there."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import nn
from torch.nn.utils import prune

from transfer_surgery import (
    bake,
    convert,
    fold_targets,
    match_targets,
    swap_targets,
)
from transfer_surgery.activations import ActivationModule
from transfer_surgery.surgery import folding
from transfer_surgery.units import FittedActivation, PerChannel, TargetParameters

pytestmark = pytest.mark.filterwarnings("ignore:a gate saw fewer")  # a few images will do here


def matched(model: nn.Module, x: torch.Tensor, target: str = "sin", **options) -> nn.Module:
    """A baked model whose matched targets have numbers far from 1, 1, 0, 0."""
    units = convert(model.eval(), target, example_input=x, **options)
    match_targets(units, [x])
    bake(swap_targets(model))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, FittedActivation):
            for parameter in module.parameters(recurse=False):
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def folded(model: nn.Module, x: torch.Tensor, share: float = 1e-4) -> list[tuple[str, str, str]]:
    """What went where; outputs are compared in evaluation mode."""
    model.eval()
    with torch.no_grad():
        before = model(x)
        report = fold_targets(model, x[:2])
        torch.testing.assert_close(model(x), before, rtol=0, atol=share * before.abs().max())
    return [(row.before, row.after, row.left) for row in report.rows]


IMAGES = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def images(*behind: nn.Module, before: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(4, 6, 3, padding=1)
    layers = [first, *before, nn.ReLU(), *behind, nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*layers)
    model(IMAGES)
    return model


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


class Readers(nn.Module):
    """Its activation's input, or output, is read twice, or a layer is called twice."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.one, self.act, self.two = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        if what == "weights":
            self.two.weight = self.one.weight
        if what == "hooks":
            self.one.register_forward_hook(lambda m, args, y: y.clamp(max=1e6))
        if what == "hooked site":
            self.act.register_forward_hook(lambda m, args, y: None)
        if what == "data":
            self.two.weight = nn.Parameter(self.one.weight.data)
        if what == "attribute":
            self.transposed = self.one.weight.data.T
        if what == "frozen":
            self.one.weight.requires_grad_(False)
        if what == "pruned":
            prune.identity(self.one, "weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "keyword":
            return self.two(input=self.act(self.one(input=x)))
        y = self.one(x)
        z = self.act(y)
        out = self.two(z)
        if self.what == "functional":
            return F.linear(out, self.one.weight)
        if self.what == "transposed":
            return out @ self.one.weight.T
        if self.what == "bias":
            return out + self.one.bias.data
        if self.what == "numbers" and hasattr(self.act, "w"):
            return out * self.act.w
        if self.what == "input":
            return out + y
        if self.what == "output":
            return out + z
        if self.what == "view":
            return out + y.view(-1, 4)[:, :1]
        if self.what == "in place":
            return out + z.mul_(2)
        if self.what == "layer":
            return self.two(out)
        return (out, z) if self.what == "returned" else out


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("nothing", ("one", "two")),
        ("input", ("(several readers)", "two")),
        ("view", ("(several readers)", "two")),
        ("output", ("one", "(several readers)")),
        ("in place", ("one", "(several readers)")),
        ("layer", ("one", "(two is shared)")),
        ("weights", ("(one is shared)", "(two is shared)")),
        ("hooks", ("(one has hooks)", "two")),
        ("hooked site", ("(the site has hooks)", "(the site has hooks)")),
        ("functional", ("(one has parameters that are read elsewhere)", "two")),
        ("transposed", ("(one has parameters that are read elsewhere)", "two")),
        ("bias", ("(one has parameters that are read elsewhere)", "two")),
        ("numbers", ("(its numbers are shared)", "(its numbers are shared)")),
        ("data", ("(one is shared)", "(two is shared)")),
        ("attribute", ("(one is shared)", "two")),
        ("frozen", ("(one is frozen)", "two")),
        ("pruned", ("(one has a computed weight)", "two")),
        ("keyword", ("one", "two")),
        ("returned", ("one", "(several readers)")),
    ],
)
def test_a_second_reader_or_call_forbids_it(what, expected):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    model = matched(Readers(what), x)
    with torch.no_grad():
        before = model(x)
        row = fold_targets(model, x[:2]).rows[0]
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert (row.before, row.after) == expected


@pytest.mark.parametrize(
    ("target", "sign", "left"),
    [
        ("relu", 1, "b"),
        ("leaky_relu", 1, "b"),
        ("relu", -1, "a, b"),
        ("relu6", 1, "a, b"),
        ("hardswish", 1, "a, b"),
    ],
)
def test_a_positive_amplitude_goes_in_front_of_a_relu_with_several_readers(target, sign, left):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    network = Readers("output")
    network.act = nn.SiLU()
    model = matched(network, x, target)
    model.act.a.data.abs_().mul_(sign)
    assert folded(model, x) == [("one", "(several readers)", left)]


def test_a_block_that_is_called_twice_stays():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    block = Readers("nothing")
    model = matched(nn.Sequential(block, block), x)
    assert folded(model, x) == [("(called 2 times)", "(called 2 times)", "a, w, c, b")]


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


def test_what_is_left_trains_as_autograd_says():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for kept in ("ab", "c", "w", "ac", ""):
        site = FittedActivation(nn.Tanh(), TargetParameters((3,), PerChannel(1)), dims=2).double()
        given = {"a": 1.0, "w": 1.0, "c": 0.0, "b": 0.0}
        for name in "awcb":
            setattr(site, name, nn.Parameter(torch.randn(3)) if name in kept else None)
            given[name] = getattr(site, name) if name in kept else given[name]
        expected = given["a"] * torch.tanh(given["w"] * x + given["c"]) + given["b"]
        found = site(x)
        torch.testing.assert_close(found, expected)
        wanted = [x, *site.parameters()]
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_frozen_layers_and_modes_stay_as_they_are():
    model = matched(images(nn.Conv2d(6, 6, 3, bias=False)), IMAGES).train()
    model[2].eval()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert folded(model.train(), IMAGES) == [("(0 is frozen)", "(2 is frozen)", "a, w, c, b")]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_optimizers_made_before_train_the_folded_network():
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    report = fold_targets(model, IMAGES)
    assert {id(p) for p in model.parameters()} <= held
    assert [row.added for row in report] == [""]
    before = copy.deepcopy(model.state_dict())
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_new_bias_is_in_the_report():
    layers = images(nn.Conv2d(6, 6, 3, bias=False))
    report = fold_targets(matched(layers, IMAGES), IMAGES)
    assert report.rows[0].added == "2.bias"
    assert str(report).endswith("new, not known to an optimizer made before: 2.bias")


def test_folding_looks_at_the_example_before_it_changes_anything():
    model = images(nn.Conv2d(6, 6, 3))
    match_targets(convert(model, "sin", example_input=IMAGES), [IMAGES])
    bake(swap_targets(model))
    before = str(model)
    with pytest.raises(ValueError, match="a batch is a list"):
        fold_targets(model, [IMAGES, 3])
    assert str(model) == before


class Unseen(torch.autograd.Function):
    """Reads a tensor where no torch function is called on it, as a kernel of one's own does."""

    @staticmethod
    def forward(ctx, x, read):
        return x + torch.from_numpy(read.numpy())

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act2(self.two(self.act1(self.one(x))))
        with torch._C.DisableTorchFunction():
            read = Unseen.apply(y, self.three.weight.detach()[:1])
        return read + self.three(y)


def test_what_the_outputs_reveal_alone_keeps_one_place_from_folding():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    rows = folded(matched(Hidden(), x), x)
    assert rows[0] == ("one", "two", "")
    assert rows[1] == ("(outputs would change)", "(outputs would change)", "a, w, c, b")


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES)
    before = copy.deepcopy(model.state_dict())

    def fails(changes, site, layer):
        raise KeyboardInterrupt

    monkeypatch.setattr(folding, "_fold_behind", fails)
    with pytest.raises(KeyboardInterrupt):
        fold_targets(model, IMAGES)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_gates_are_refused():
    model = convert(images(), "sin", example_input=IMAGES)
    with pytest.raises(ValueError, match=r"still has gates at 1 sites, such as '1': call bake"):
        fold_targets(model, IMAGES)


def test_where_nothing_was_transferred_there_is_nothing_to_fold():
    model = convert(images(), "sin", example_input=IMAGES)
    match_targets(model, [IMAGES])
    before = model.eval()(IMAGES)
    report = fold_targets(bake(model), IMAGES)
    assert "nothing to fold" in str(report)
    assert report.parameters_before == report.parameters_after
    assert torch.equal(model(IMAGES), before)


def test_the_report_counts_parameters():
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES)
    count = sum(p.numel() for p in model.parameters())
    report = fold_targets(model, IMAGES)
    assert (report.parameters_before, report.parameters_after) == (count, count - 24)
    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "w,", "c", "went", "to", "a,", "b", "went", "to", "left"]
    assert lines[2].split() == ["1", "0", "2", "-"]
    assert lines[-1] == f"{count:,} parameters before, {count - 24:,} after"
    assert report.to_dict()["rows"][0] == {
        "path": "1",
        "before": "0",
        "after": "2",
        "left": "",
        "added": "",
    }


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
