"""recompute_activations: the memory of the original network, and the same gradients."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from memory import waiting_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from transfer_surgery import HardConcrete, bake, convert, recompute_activations, revert
from transfer_surgery.units import gated_activations

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def held(model: nn.Module, x: torch.Tensor) -> int:
    return waiting_bytes(lambda: model(x).square().mean())


def at(model: nn.Module, log_alpha: float) -> nn.Module:
    for _, unit in gated_activations(model):
        unit.log_alpha.data.fill_(log_alpha)
    return model


def without_norms() -> nn.Module:
    """As VGG has them, layers that read a ReLU's output directly."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize(
    ("name", "without", "log_alpha"),
    [
        ("resnet18", 1.35, 20.0),
        ("resnet18", 1.35, 0.0),
        ("resnet18", 1.35, -20.0),
        ("no norms", 1.5, 0.0),
        pytest.param("efficientnet_b0", 1.0, 0.0, marks=pytest.mark.slow),
        pytest.param("resnet50", 1.35, 0.0, marks=pytest.mark.slow),
        pytest.param("vgg11", 1.5, 0.0, marks=pytest.mark.slow),
    ],
)
def test_what_waits_for_backward_is_what_the_original_keeps(name, without, log_alpha):
    model = without_norms() if name == "no norms" else timm.create_model(name, num_classes=10)
    original = held(copy.deepcopy(model), IMAGES)
    plain = at(convert(copy.deepcopy(model), "sin", example_input=IMAGES[:2]), log_alpha)
    if log_alpha < 20:
        assert held(plain, IMAGES) > without * original
    recomputing = recompute_activations(convert(model, "sin", example_input=IMAGES[:2]))
    assert held(at(recomputing, log_alpha), IMAGES) < 1.02 * original


class Everything(nn.Module):
    """Norms and sites of each kind: behind a norm, behind a sum, behind a layer, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.act, self.last, self.head = nn.ReLU(inplace=True), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)) + x)
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        return self.head(F.gelu(self.last(tokens)))


def gradients(recompute: bool, change=None, **options):
    torch.manual_seed(0)
    x = IMAGES[:2, :, :8, :8].double()
    model = convert(Everything().double(), "sin", seed=0, example_input=x, **options)
    recompute_activations(model, enabled=recompute)
    for _, unit in gated_activations(model):
        unit.log_alpha.data.normal_(generator=torch.Generator().manual_seed(2))
    if change:
        change(model)
    torch.manual_seed(3)
    loss = model(IMAGES[..., :8, :8].double()).square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, model


def frozen_norm(model: nn.Module) -> None:
    model.bn1.bias.requires_grad_(False)


def norm_in_eval(model: nn.Module) -> None:
    model.bn1.eval()
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize("change", [None, frozen_norm, norm_in_eval])
@pytest.mark.parametrize("noise", ["batch", "example"])
def test_gradients_are_those_without_it(change, noise):
    expected, _ = gradients(False, change, gate=HardConcrete(noise=noise))
    found, _ = gradients(True, change, gate=HardConcrete(noise=noise))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9)


def test_matched_targets_are_recomputed_too():
    def free(model: nn.Module) -> None:
        for _, unit in gated_activations(model):
            for parameter in unit.add_fitted_target().parameters():
                parameter.data += 0.1

    (expected, _), (found, _) = gradients(False, free), gradients(True, free)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


class Changed(nn.Module):
    """Changes what its activation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.act(self.one(x)).mul_(3))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(checkpoint(self.part, x, use_reentrant=False))


@pytest.mark.parametrize(("cls", "log_alpha"), [(Changed, -20.0), (Checkpointed, 0.0)])
def test_changes_in_place_and_checkpoints_work_as_before(cls, log_alpha):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        x = torch.randn(8, 4)
        model = at(convert(cls(), "sin", example_input=x), log_alpha)
        recompute_activations(model, enabled=recompute)
        torch.manual_seed(1)
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("recompute", [False, True])
def test_changing_in_place_what_backward_needs_is_an_error_as_ever(recompute):
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(self.layer(x))
            z = y.sigmoid()
            return z.exp() + z.mul_(2)

    x = torch.randn(3, 4)
    model = recompute_activations(convert(Wrong(), "sin", example_input=x), enabled=recompute)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()


def test_second_derivatives_go_through():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 1))
    found = []
    for recompute in (False, True):
        converted = convert(copy.deepcopy(model), "sin", example_input=x)
        recompute_activations(converted, enabled=recompute)
        loss = at(converted, -20.0)(x).square().sum()
        (grad,) = torch.autograd.grad(loss, converted[0].weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), converted[0].weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def hooks(model: nn.Module) -> list[object]:
    return [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]


def test_it_is_switched_off_by_revert_and_bake_and_by_hand():
    def model() -> nn.Module:
        layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        return recompute_activations(convert(layers, example_input=torch.zeros(2, 3)))

    on = model()
    assert len(hooks(on)) == 2
    assert len(hooks(recompute_activations(on))) == 2  # not twice
    for off in (revert(model()), bake(model()), recompute_activations(model(), enabled=False)):
        assert hooks(off) == []
        assert not off._forward_hooks_always_called


def test_copies_and_pickles_recompute_too():
    model = at(convert(Everything(), "sin", example_input=IMAGES[:2, :, :8, :8]), 0.0)
    recompute_activations(model)
    x = IMAGES[..., :8, :8]
    plain = held(recompute_activations(copy.deepcopy(model), enabled=False), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(hooks(other)) == 2
        assert held(other, x) < 0.85 * plain


def test_an_error_inside_the_model_leaves_nothing_behind():
    x = torch.zeros(2, 3)
    model = convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), example_input=x)
    recompute_activations(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.randn(2, requires_grad=True).sin()
    assert len(saved) == 1  # these hooks are the only ones
    model(x).sum().backward()


def test_compiled_models_ignore_it():
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)]
    model = at(convert(nn.Sequential(*layers), "sin", example_input=x), -20.0)
    recompute_activations(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for network in (model, compiled):
        network(x).square().sum().backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
