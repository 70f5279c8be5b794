"""The paper's networks have the published sizes, activations, gates and starting weights."""

import math
from dataclasses import replace

import cifar_resnet
import pytest
import torch
from networks import ROWS, LeNet5, ResNet, find_row, initialise, perceptron
from protocol import Protocol
from safetensors.torch import load_file
from tasks import load_cifar10
from torch import nn

from transfer_surgery import find_activations, report

PLAIN = Protocol(epochs=1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_perceptron_has_400_units_and_lenet_its_61706_parameters_and_four_activations():
    layers = [layer for layer in perceptron("resin") if isinstance(layer, nn.Linear)]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert shapes == [(400, 1), (400, 400), (400, 400), (1, 400)]
    model = LeNet5("tanh")
    by_layer = [6 * 26, 16 * (6 * 25 + 1), 120 * 401, 84 * 121, 10 * 85]
    assert parameters(model) == sum(by_layer) == 61_706
    plan = find_activations(model, torch.zeros(2, 1, 28, 28))
    assert [site.path for site in plan] == ["act1", "act2", "act3", "act4"]
    assert {(str(site.source), site.role) for site in plan} == {("tanh", "hidden")}


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (56, 0.85), (110, 1.7)])
def test_resnets_have_the_published_size_and_an_activation_after_all_layers_but_the_last(
    depth, millions
):
    model = ResNet("resin", depth)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)
    plan = find_activations(model, torch.zeros(2, 3, 32, 32))
    assert len(plan) == depth - 1
    assert {(str(site.source), site.channel_axis) for site in plan} == {("resin", 1)}
    with pytest.raises(ValueError, match=r"depth=21: use 6n \+ 2"):
        ResNet("relu", 21)


@torch.no_grad()
def test_trained_weights_compute_what_they_do_in_the_example_bit_for_bit(data_folder):
    weights = load_file(data_folder / "weights" / "cifar10_resnet20.safetensors")
    ours, example = ResNet("relu", 20).eval(), cifar_resnet.ResNet(20).eval()
    ours.load_state_dict(weights)
    example.load_state_dict(weights)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(ours(x), example(x))


@pytest.mark.slow
@torch.no_grad()
def test_the_trained_resnet20_errs_on_8_27_percent_of_the_test_images(data_folder):
    model = ResNet("relu", 20).eval()
    model.load_state_dict(load_file(data_folder / "weights" / "cifar10_resnet20.safetensors"))
    images = load_cifar10(torch.device("cpu"))
    batches = zip(*(part.split(500) for part in images.test), strict=True)
    assert sum((model(images.seen(x)).argmax(1) != y).sum().item() for x, y in batches) == 827


# ---- starting weights


def test_weights_of_sin_are_normal_and_biases_uniform_in_a_period():
    model = perceptron("sin")
    initialise(model, "sin", PLAIN)
    weight, biases = model[2].weight, torch.cat([model[i].bias for i in (0, 2, 4)])
    number = weight.numel()
    assert weight.std().item() == pytest.approx(0.1, rel=5 / math.sqrt(2 * number))
    # Of a normal distribution: kurtosis 3, with a standard error of sqrt(24 / number).
    kurtosis = (weight / weight.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / number))
    assert 0.98 * math.pi < biases.abs().max() <= math.pi
    assert biases.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(("activation", "choice"), [("tanh", "fourier"), ("sin", "kaiming")])
def test_other_networks_and_sin_if_asked_start_as_pytorchs_layers_do(activation, choice):
    model = LeNet5(activation)
    before = model.fc1.weight.clone()
    initialise(model, activation, replace(PLAIN, sin_init=choice))
    assert not torch.equal(model.fc1.weight, before)
    for layer in (model.conv2, model.fc1):
        bound = 1 / math.sqrt(layer.weight[0].numel())  # He's uniform one with a = sqrt(5)
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_kaiming_normal_keeps_the_variance_through_relu_and_has_no_biases():
    model = LeNet5("relu")
    initialise(model, "relu", replace(PLAIN, kaiming="normal"))
    for layer in (model.conv2, model.fc1):
        expected = math.sqrt(2 / layer.weight[0].numel())
        tolerance = 5 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(expected, rel=tolerance)
        assert layer.weight.abs().max() > math.sqrt(3) * expected  # beyond a uniform one
        assert not layer.bias.any()


# ---- the ten rows


def test_rows_are_those_of_section_4_1_and_are_found_by_name_and_slug():
    names = "sin resin tanh relu Copy Line Bern resin->sin tanh->sin relu->sin"
    assert [row.name for row in ROWS] == names.split()
    for row in ROWS:
        for name in (row.name, row.slug, row.name.upper()):
            assert find_row(name) is row
    with pytest.raises(ValueError, match=r"unknown network 'gelu'\. Known: sin, resin, tanh, "):
        find_row("gelu")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_a_network_has_its_own_source_and_the_gates_of_the_protocol(row):
    protocol = replace(PLAIN, granularity="layer", noise="example")
    model = row.convert(perceptron(row.source, 4), protocol, torch.zeros(2, 1))
    if row.gate is None:
        assert row.name == row.source == str(model[1].activation)
        return
    assert row.source == (row.name.split("->")[0] if "->" in row.name else "resin")
    for site in report(model):
        assert (site.source, site.target, site.granularity) == (row.source, "sin", "layer")
    gate = model[1].gate
    assert gate.settings.name == row.gate
    assert row.learned == hasattr(gate, "log_alpha")
    assert not row.learned or gate.settings.noise == "example"
