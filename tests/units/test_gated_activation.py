import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery import (
    Bernoulli,
    GatedActivation,
    HardConcrete,
    PerChannel,
    PerLayer,
    PerNeuron,
    convert,
    get_activation,
)
from transfer_surgery.units import (
    GateSettings,
    Granularity,
    gated_activations,
    granularity_of,
    make_gate,
)

CERTAIN = 20.0  # log_alpha of gates that no noise moves


def unit(
    shape: tuple[int, ...] = (),
    granularity: str | Granularity = "layer",
    *,
    at: float | list | None = None,
    gate: str | GateSettings = "hard_concrete",
    source: str = "relu",
    target: str = "sin",
    **options,
) -> GatedActivation:
    module = make_gate(gate, shape)
    if at is not None:
        module.log_alpha.data.copy_(torch.tensor(at))
    pair = get_activation(source), get_activation(target)
    shared = granularity_of(granularity)
    return GatedActivation(*pair, module, granularity=shared, path="net.act", **options)


# --- granularity -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "axis"),
    [
        ((2, 3), 1),
        ((2, 3), -1),
        ((2, 3, 4, 5), 1),
        ((2, 4, 5, 3), -1),
        ((2, 4, 3), 2),
        ((2, 3, 4), -2),
    ],
)
def test_each_channel_has_a_gate_wherever_the_channel_axis_is(size, axis):
    module = unit((3,), PerChannel(axis), at=[9.0, -9.0, 0.0]).eval()
    x = torch.randn(size)
    parts = zip(module(x).unbind(axis), x.unbind(axis), strict=True)
    (first, x0), (second, x1), (third, x2) = parts
    assert torch.equal(first, x0.relu())
    assert torch.equal(second, x1.sin())
    torch.testing.assert_close(third, (x2.relu() + x2.sin()) / 2)


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((), PerLayer()),
        ((3,), PerChannel(1)),
        ((4,), PerChannel(-1)),
        ((3, 4), PerNeuron()),
    ],
)
def test_noise_per_example_differs_between_examples_and_noise_per_batch_does_not(
    shape, granularity
):
    x = torch.full((6, 3, 4), -1.0)  # relu gives 0 and square 1: the output is 1 - z
    options = {"at": torch.zeros(shape).tolist(), "target": "square"}
    same = unit(shape, granularity, **options)(x)
    assert (same == same[:1]).all()
    different = unit(shape, granularity, gate=HardConcrete(noise="example"), **options)(x)
    assert (different != different[:1]).any()
    gates = {(): 1, (3,): 3, (4,): 4, (3, 4): 12}[shape]
    assert all(len(example.unique()) <= gates for example in different)


# --- training and prediction -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HardConcrete, Bernoulli])
def test_without_noise_training_uses_the_gates_of_prediction(kind):
    module = unit((50,), "channel", gate=kind(noise="none"), at=torch.randn(50).tolist())
    x, state = torch.randn(5, 50), torch.get_rng_state()
    trained = module.train()(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained, module.eval()(x))
    trained.sum().backward()
    assert module.log_alpha.grad.any()


def test_without_noise_the_gradient_is_that_of_equation_16():
    module = unit((50,), "channel", gate=HardConcrete(noise="none"), at=torch.randn(50).tolist())
    x = torch.randn(5, 50, dtype=torch.float64)
    module.double().train()(x).square().sum().backward()
    log_alpha = module.log_alpha.detach().double().requires_grad_()
    z = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)
    (z * torch.relu(x) + (1 - z) * torch.sin(x)).square().sum().backward()
    torch.testing.assert_close(module.log_alpha.grad.double(), log_alpha.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_autocast_and_half_models_give_their_dtype(granularity):
    module = unit((4,) if granularity == "channel" else (), granularity)
    module.log_alpha.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.Sequential(nn.Linear(4, 4), module)(torch.randn(2, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.log_alpha.grad.dtype == torch.float32
    assert module.half()(torch.randn(2, 4).half()).dtype == torch.float16


def test_channels_last_is_kept():
    module = unit((3,), "channel", at=[9.0, 0.0, -9.0]).eval()
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_an_overwritten_input_holds_the_result_and_passes_its_gradient():
    x = torch.randn(4, 3)
    results = []
    for function in (F.relu_, unit((3,), "channel", overwrites_input=True).eval()):
        leaf = x.clone().requires_grad_()
        hidden = leaf * 2
        y = function(hidden)
        (y.sum() + (hidden**2).sum()).backward()
        assert y is hidden
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# --- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "gates", "size", "message"),
    [
        ("channel", (3,), (2, 4), r"made for channels \(3,\), the input has \(4,\)\. Fix: "),
        (PerChannel(3), (3,), (2, 3), "gates were made for channels"),
        ("neuron", (3, 4), (2, 3, 5), r"neurons \(3, 4\).*\(3, 5\).*'channel'"),
    ],
)
def test_an_input_of_another_size_names_the_place_the_shapes_and_the_fix(
    granularity, gates, size, message
):
    with pytest.raises(ValueError, match=rf"net\.act: .*{message}"):
        unit(gates, granularity)(torch.randn(size))


def test_repr_says_what_the_unit_does():
    assert "(relu -> sin, channel" in repr(unit((3,), "channel")).replace("\n  ", "")


def test_gates_without_parameters_have_no_log_alpha():
    module = unit((3,), "channel", gate="line")
    assert not hasattr(module, "log_alpha")
    module.gate.progress.fill_(1.0)
    x = torch.randn(2, 3)
    assert torch.equal(module(x), x.sin())


def test_units_are_enumerated_in_order_and_once():
    shared = unit()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1), shared), "b": unit(), "c": shared})
    assert [path for path, _ in gated_activations(model)] == ["a.1", "b"]
    with pytest.raises(ValueError, match=r"Linear has no gated activations: call convert"):
        list(gated_activations(nn.Linear(1, 1)))


# --- what must go on working -------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(
    "gate",
    [HardConcrete(noise="example"), Bernoulli(noise="example"), "line", "copy"],
    ids=str,
)
def test_copies_compute_the_same_and_are_independent(gate, clone):
    module = unit((3,), "channel", gate=gate, source="leaky_relu")
    other = clone(module)
    x = torch.randn(5, 3)
    samples = []
    for each in (module, other):
        torch.manual_seed(0)
        samples.append(each(x))
    assert torch.equal(*samples)
    for mine, copied in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert mine.data_ptr() != copied.data_ptr()


def test_a_unit_in_eval_mode_exports_for_any_batch_size():
    module = unit((3,), "channel", at=[9.0, 0.0, -9.0]).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=dynamic).module()
    x = torch.randn(9, 3)
    torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("training", [True, False])
def test_stacked_units_run_under_vmap(training):
    units = [
        unit((3,), "channel", at=[CERTAIN, -CERTAIN, a]).train(training) for a in (25.0, -25.0)
    ]
    parameters, _ = torch.func.stack_module_state(units)
    x = torch.randn(4, 3)

    def run(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(units[0], p, (x,))

    found = torch.vmap(run, randomness="different")(parameters)
    torch.testing.assert_close(found, torch.stack([u(x) for u in units]))


@pytest.mark.parametrize("source", ["relu", "relu6"])
def test_while_all_gates_are_1_in_training_the_memory_is_that_of_the_original(source):
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True), nn.Conv2d(3, 2, 1)]
    if source == "relu6":
        layers[2] = nn.ReLU6(True)
    x = torch.randn(4, 2, 6, 6)
    model = nn.Sequential(*layers)
    gated = convert(copy.deepcopy(model), example_input=x)
    gated[2].log_alpha.data.fill_(20.0)
    seen = []
    gated[2].register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    gradients = []
    for network in (model, gated):
        network(x).square().sum().backward()
        gradients.append([p.grad for n, p in network.named_parameters() if "log_alpha" not in n])
    assert all(map(torch.equal, *gradients))
    assert torch.equal(gated[2].log_alpha.grad, torch.zeros(3))
    ((given, result),) = seen
    assert given.data_ptr() == result.data_ptr()
    gated[2].log_alpha.data.fill_(0.0)
    gated(x)
    gated.eval()(x)
    assert all(given.data_ptr() != result.data_ptr() for given, result in seen[1:])


def test_an_input_of_the_network_and_a_view_are_not_overwritten():
    x = torch.randn(4, 3)
    unit = convert(nn.Sequential(nn.ReLU(True)), example_input=x)[0]
    unit.log_alpha.data.fill_(20.0)
    before = x.clone()
    unit(x)
    unit(x.requires_grad_())
    assert torch.equal(x, before)
    whole = x * 1
    unit(whole[:2])
    assert torch.equal(whole, before)
