"""The paper's networks have the published sizes, activations and starting weights."""

import math

import cifar_resnet
import pytest
import torch
from torch import Tensor, nn

from transfer_surgery import convert, find_activations
from transfer_surgery.reproduce.images import load_cifar10
from transfer_surgery.reproduce.initialise import initialise
from transfer_surgery.reproduce.networks import LeNet5, ResNet, perceptron
from transfer_surgery.reproduce.protocol import Protocol
from transfer_surgery.units import gated_activations


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet_parameters(depth: int) -> int:
    """Table 6 of He et al. (2016) in numbers: n = (depth - 2) / 6 blocks of each width."""
    n = (depth - 2) // 6
    stem = 3 * 9 * 16 + 2 * 16
    total = stem + 64 * 10 + 10
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        convolutions = 9 * inputs * outputs + (2 * n - 1) * 9 * outputs**2
        norms = 2 * n * 2 * outputs
        total += convolutions + norms
    return total


def trained(folder, depth: int = 20) -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    file = folder / "weights" / f"cifar10_resnet{depth}.safetensors"
    return safetensors.load_file(file)


def test_lenet_has_its_61706_parameters_and_four_activations():
    model, x = LeNet5("tanh"), torch.zeros(2, 1, 28, 28)
    by_layer = [6 * 26, 16 * (6 * 25 + 1), 120 * 401, 84 * 121, 10 * 85]
    assert parameters(model) == sum(by_layer) == 61_706
    plan = find_activations(model, x)
    assert [site.path for site in plan] == ["act1", "act2", "act3", "act4"]
    assert {(str(site.source), site.role) for site in plan} == {("tanh", "hidden")}
    gates = [unit.gate.count for _, unit in gated_activations(convert(model, example_input=x))]
    assert gates == [6, 16, 120, 84]
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_resnets_have_the_published_number_of_parameters(depth, millions):
    found = parameters(ResNet("relu", depth))
    assert found == resnet_parameters(depth)
    assert found / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)


@pytest.mark.parametrize("depth", [20, 110])
def test_every_layer_of_a_resnet_but_the_last_has_an_activation_that_is_found(depth):
    plan = find_activations(ResNet("resin", depth), torch.zeros(2, 3, 32, 32))
    assert len(plan) == depth - 1
    assert {(str(site.source), site.role, site.channel_axis) for site in plan} == {
        ("resin", "hidden", 1)
    }


@pytest.mark.parametrize("depth", [-4, 2, 18, 21, 51])
def test_depths_other_than_6n_plus_2_are_refused(depth):
    with pytest.raises(ValueError, match=rf"depth={depth}: use 6n \+ 2"):
        ResNet("relu", depth)


def test_the_perceptron_has_three_hidden_layers_of_400():
    model = perceptron("resin")
    shapes = [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)]
    assert shapes == [(400, 1), (400, 400), (400, 400), (1, 400)]
    assert len(find_activations(model, torch.zeros(2, 1))) == 3
    assert model(torch.zeros(5, 1)).shape == (5, 1)
    assert len(perceptron("sin", width=3, layers=1)) == 3


# ---- trained weights


@pytest.mark.parametrize("depth", [20, 56])
@torch.no_grad()
def test_trained_weights_compute_what_they_do_in_the_example_bit_for_bit(data_folder, depth):
    weights = trained(data_folder, depth)
    ours, example = ResNet("relu", depth).eval(), cifar_resnet.ResNet(depth).eval()
    ours.load_state_dict(weights)
    example.load_state_dict(weights)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(ours(x), example(x))


@pytest.mark.slow
@torch.no_grad()
def test_the_trained_resnet20_errs_on_8_27_percent_of_the_test_images(data_folder):
    model = ResNet("relu", 20).eval()
    model.load_state_dict(trained(data_folder))
    images = load_cifar10(torch.device("cpu"))
    batches = zip(images.x_test.split(500), images.y_test.split(500), strict=True)
    wrong = sum((model(images.seen(x)).argmax(1) != y).sum().item() for x, y in batches)
    assert wrong == 827


# ---- starting weights

SIN = Protocol(epochs=1)


def test_weights_of_sin_are_normal_and_biases_uniform_in_a_period():
    model = perceptron("sin")
    initialise(model, "sin", Protocol(epochs=1, sin_std=0.3))
    weight, biases = model[2].weight, torch.cat([model[i].bias for i in (0, 2, 4)])
    number = weight.numel()
    assert abs(weight.mean()) < 5 * 0.3 / math.sqrt(number)
    assert weight.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(2 * number))
    # Of a normal distribution: kurtosis 3, with a standard error of sqrt(24 / number).
    kurtosis = (weight / weight.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / number))
    assert biases.abs().max() <= math.pi
    assert biases.abs().max() > 0.98 * math.pi
    assert biases.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.1)


def test_sin_starts_from_a_standard_deviation_of_0_1():
    model = ResNet("sin", 20)
    initialise(model, "sin", SIN)
    for layer in (model.conv1, model.layer3[2].conv2, model.linear):
        tolerance = 5 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(0.1, rel=tolerance)
    assert model.linear.bias.abs().max() > 1
    assert torch.equal(model.bn1.weight, torch.ones(16))
    assert torch.equal(model.bn1.bias, torch.zeros(16))


def test_sin_can_start_as_the_others_do():
    networks = [perceptron("sin"), perceptron("relu")]
    for model, activation in zip(networks, ("sin", "relu"), strict=True):
        torch.manual_seed(0)
        initialise(model, activation, Protocol(epochs=1, sin_init="kaiming"))
    for ours, others in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(ours, others)


@pytest.mark.parametrize("activation", ["relu", "tanh", "resin"])
def test_other_networks_start_as_pytorchs_layers_do(activation):
    model = LeNet5(activation)
    before = model.fc1.weight.clone()
    initialise(model, activation, SIN)
    assert not torch.equal(model.fc1.weight, before)
    for layer in (model.conv2, model.fc1, model.fc2):
        bound = 1 / math.sqrt(layer.weight[0].numel())  # He's uniform one with a = sqrt(5)
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= bound
        assert layer.weight.abs().max() > 0.99 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_kaiming_normal_keeps_the_variance_through_relu_and_has_no_biases():
    model = LeNet5("relu")
    initialise(model, "relu", Protocol(epochs=1, kaiming="normal"))
    for layer in (model.conv2, model.fc1, model.fc2):
        expected = math.sqrt(2 / layer.weight[0].numel())
        tolerance = 5 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(expected, rel=tolerance)
        assert layer.weight.abs().max() > math.sqrt(3) * expected  # beyond a uniform one
        assert not layer.bias.any()


def test_starting_weights_follow_the_seed():
    first, second, other = (perceptron("sin", 8) for _ in range(3))
    for seed, model in ((1, first), (1, second), (2, other)):
        torch.manual_seed(seed)
        initialise(model, "sin", SIN)
    assert torch.equal(first[2].weight, second[2].weight)
    assert not torch.equal(first[2].weight, other[2].weight)
