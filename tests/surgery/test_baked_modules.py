"""Baked networks are as plain as torch's own: traced, scripted, copied, with their parameters."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from transfer_surgery import bake, convert, fold_targets, get_activation
from transfer_surgery.activations import register_activation, registered_activations
from transfer_surgery.surgery.baked_modules import MixedActivation
from transfer_surgery.units import FittedActivation, gated_activations

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

SHAPES = {
    "images": (4, 3, 5, 6),
    "tokens": (4, 7, 3),
    "sequences": (4, 3, 7),
    "features": (4, 3),
}


class Network(nn.Module):
    """An activation between two layers that work along the same axis."""

    def __init__(self, kind: str, activation: nn.Module) -> None:
        super().__init__()
        layers = {
            "images": lambda: nn.Conv2d(3, 3, 3, padding=1),
            "sequences": lambda: nn.Conv1d(3, 3, 3, padding=1),
        }
        make = layers.get(kind, lambda: nn.Linear(3, 3))
        self.one, self.act, self.two = make(), activation, make()

    def forward(self, x):
        return self.two(self.act(self.one(x)))


def units_at(model: nn.Module, ends: list[float], fitted: bool) -> nn.Module:
    """Set gates and numbers of all units."""
    for _, unit in gated_activations(model):
        log_alpha = unit.log_alpha.data.flatten()
        log_alpha.copy_(torch.tensor(ends).repeat(len(log_alpha))[: len(log_alpha)])
        if fitted:
            for parameter in unit.add_fitted_target().parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("ends", [[-9.0], [9.0, -9.0], [0.5, -0.3, -9.0]], ids=str)
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("kind", SHAPES)
def test_baked_networks_compute_the_same_however_they_are_taken(kind, granularity, ends):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[kind])
    model = convert(
        Network(kind, nn.LeakyReLU(0.2, inplace=True)),
        "snake(a=0.7)",
        granularity=granularity,
        example_input=x,
    )
    units_at(model, ends, fitted=True)
    expected = model(x).detach()
    exact = len(ends) < 3
    bake(model)
    ways = {
        "eager": model,
        "fx": fx.symbolic_trace(model),
        "script": torch.jit.script(model),
        "trace": torch.jit.trace(model, x),
        "copy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "export": torch.export.export(model, (x,)).module(),
    }
    for name, way in ways.items():
        tolerance = {} if not exact or name == "script" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(way(x), expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    # Another batch: nothing about the example is frozen.
    for name in ("fx", "script", "trace"):
        torch.testing.assert_close(ways[name](x[:2]), model(x[:2]))
    # A layer has one gate, which is at one end.
    assert len(ends) == 1 or granularity == "layer" or isinstance(model.act, MixedActivation)
    assert len(ends) == 2 or isinstance(model.act, (MixedActivation, FittedActivation))


@pytest.mark.parametrize("name", registered_activations())
def test_each_activation_can_be_scripted_and_traced_as_a_baked_module(name):
    if get_activation(name).operands:
        pytest.skip("a source only")
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    source = nn.ReLU() if name != "relu" else nn.ReLU6()
    model = convert(Network("features", source), name, example_input=x)
    bake(units_at(model, [-9.0], fitted=False))
    for taken in (torch.jit.script(model), fx.symbolic_trace(model)):
        torch.testing.assert_close(taken(x), model(x))


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), nn.PReLU(3)

    def forward(self, x):
        return self.act(self.linear(x))


@pytest.mark.parametrize("ends", [[-9.0], [9.0, -9.0], [9.0]], ids=str)
def test_sites_that_pass_tensors_are_traced_too(ends):
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    model = units_at(convert(Slope(), "sin", example_input=x), ends, fitted=True)
    expected = model(x)
    bake(model)
    for taken in (model, fx.symbolic_trace(model), torch.jit.trace(model, x)):
        assert torch.equal(taken(x), expected)


def test_parameters_stay_the_same_objects():
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    model = convert(Network("features", nn.ReLU()), "sin", example_input=x)
    units_at(model, [-9.0], fitted=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bake(model)
    before = copy.deepcopy(model.state_dict())
    model(x).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_arithmetic_of_fitted_numbers_is_float32_at_least(dtype):
    torch.manual_seed(0)
    x = 9 * torch.randn(64, 3)
    model = units_at(
        convert(Network("features", nn.ReLU()), "sin", example_input=x), [-9.0], fitted=True
    )
    act = bake(model).act.to(dtype)
    a, w, c, b = (getattr(act, name).detach() for name in "awcb")
    given = x.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = a * torch.sin(w * given.to(wide) + c) + b
    assert torch.equal(act(given), expected.to(dtype))


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("at", [200.0, -1.0])
def test_a_branch_that_counts_for_nothing_does_no_harm_in_backward(at):
    name = "exp_and_root"
    register_activation(name)(lambda x: torch.exp(x * x) + torch.sqrt(x))
    x = torch.full((2, 3), at, requires_grad=True)
    model = convert(nn.Sequential(nn.ReLU()), name, example_input=x.detach())
    bake(units_at(model, [9.0, 9.0, -9.0], fitted=False))
    model(x)[:, :2].sum().backward()
    assert torch.equal(x.grad[:, :2], torch.full((2, 2), float(at > 0)))


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("inference", [False, True])
def test_a_target_without_a_gradient_is_baked_also_in_inference_mode(inference):
    register_activation("heaviside")(lambda x: (x > 0).to(x.dtype))
    x = torch.randn(8, 3)
    model = convert(Network("features", nn.GELU()), "heaviside", example_input=x)
    expected = units_at(model, [9.0, 0.5, -9.0], fitted=False)(x)
    with torch.inference_mode(inference):
        bake(model)
    assert not model.act.guards_target
    torch.testing.assert_close(model(x), expected)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [Functional, lambda: Network("features", nn.ReLU())])
def test_units_are_nodes_of_a_graph_and_script_refuses_what_it_would_get_wrong(
    make, baked, training
):
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    model = units_at(convert(make(), "sin", example_input=x), [-9.0], fitted=True)
    if baked:
        bake(model)
    traced = fx.symbolic_trace(model.train(training))
    torch.testing.assert_close(traced(x), model(x))
    if baked and make is not Functional:
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    else:
        with pytest.raises(TypeError, match=r"torch\.jit\.trace"):
            torch.jit.script(model)


@pytest.mark.parametrize("baked", [False, True])
def test_channels_that_a_pruner_takes_away_take_their_gates_along(baked):
    """As torch-pruning does: each tensor gets shorter, in a new parameter."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    model = convert(Network("images", nn.ReLU()), "sin", example_input=x)
    units_at(model, [-9.0, 0.3, 9.0], fitted=True)
    if baked:
        for _, unit in gated_activations(model):
            unit.log_alpha.data.fill_(-9.0)
        bake(model)
    expected = model.act(model.one(x))[:, [0, 2]]
    kept = torch.tensor([0, 2])
    for module in (model.one, *model.act.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.data[kept]))
    torch.testing.assert_close(model.act(model.one(x)), expected)


def test_offloaded_networks_run_and_are_brought_back_before_surgery():
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    model = units_at(
        convert(Network("features", nn.ReLU()), "sin", example_input=x), [-9.0], fitted=True
    )
    expected = model(x).detach()
    accelerate.cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r"meta device .*remove_hook_from_submodules"):
        bake(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    bake(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="is on the meta device"):
        fold_targets(model, x)
    accelerate.hooks.remove_hook_from_submodules(model)
    fold_targets(model, x)
    torch.testing.assert_close(model(x), expected)
