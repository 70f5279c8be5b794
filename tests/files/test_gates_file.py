"""save_gates and load_gates: what was saved comes back, bit for bit."""

import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from tests.helpers.checkpoints import (
    Calls,
    WhenTraining,
    X,
    chain,
    everything,
    refuses,
    register_bump,
    saved,
    spread,
)
from tests.helpers.kinds import become, keep, match, mix
from tests.helpers.promises import Body, units
from transfer_surgery import (
    Bernoulli,
    Copy,
    HardConcrete,
    Line,
    ModelSpec,
    PerChannel,
    PerLayer,
    TransferSchedule,
    convert,
    find_activations,
    load_baked,
    load_gates,
    report,
    save_baked,
    save_gates,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.activations import Activation
from transfer_surgery.files.unit_config import plain_path


class Branching(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        for _ in range(len(x.shape)):
            if x.sum() > -1e9:
                x = F.relu(super().forward(x)) - 0.1
        return x


class TwoNames(nn.Module):
    """One module under two names, called once."""

    def __init__(self):
        super().__init__()
        self.one, self.act = nn.Linear(4, 4), nn.SiLU()
        self.also = self.act

    def forward(self, x):
        return self.also(self.one(x))


IMAGE = torch.linspace(-2, 2, 2 * 3 * 160 * 160).reshape(2, 3, 160, 160)
MODELS = {
    "functions": (Calls, X),
    "reused": (Body, X),
    "a branch": (Branching, X),
    "two names": (TwoNames, X),
    "training": (WhenTraining, X),
    "root sequential": (chain, X),
    "prelu": (lambda: chain(nn.PReLU()), X),
    "timm resnet": (lambda: timm.create_model("test_resnet"), IMAGE),
    "timm vit": (lambda: timm.create_model("test_vit"), IMAGE),
}


# --- what was saved comes back -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_fresh_base_model_becomes_the_saved_one_bit_for_bit(name, file):
    make, x = MODELS[name]
    base = make().eval()
    model = spread(convert(copy.deepcopy(base), "snake(a=0.5)", example_input=x))
    save_gates(model, file)
    random = torch.get_rng_state()
    loaded = load_gates(base, file, example_input=x)
    assert torch.equal(torch.get_rng_state(), random)
    assert loaded is base
    assert torch.equal(loaded(x.clone()), model(x.clone()))
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    for path, unit in units(model).items():
        again = units(loaded)[path]
        for field in ("source", "target", "granularity", "neurons"):
            assert getattr(again, field) == getattr(unit, field)
        assert (again.position, again.stage) == (unit.position, unit.stage)
        assert again.overwrites_input == unit.overwrites_input
        assert again.training == unit.training


def test_zoo_models_need_no_example_input(file):
    model = convert(timm.create_model("test_resnet"))
    save_gates(spread(model), file)
    loaded = load_gates(timm.create_model("test_resnet"), file)
    for path, unit in units(model).items():
        assert torch.equal(units(loaded)[path].log_alpha, unit.log_alpha)


@pytest.mark.parametrize(
    "settings",
    [
        HardConcrete(noise="example", temperature=0.3, stretch=(-0.25, 1.5)),
        Bernoulli(noise="none"),
        Line(),
        Copy(),
    ],
    ids=str,
)
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_every_kind_of_gate_comes_back_with_its_settings(settings, granularity, file):
    model = saved(file, gate=settings, granularity=granularity)
    gate, again = model[1].gate, load_gates(chain(), file, example_input=X)[1].gate
    assert type(again) is type(gate)
    assert (again.shape, again.settings) == (gate.shape, settings)
    assert again.state_dict().keys() == gate.state_dict().keys()
    for name, value in gate.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.log_alpha.requires_grad if gate.learned else again.progress > 0


def test_each_site_keeps_its_own_settings(file):
    base = chain(nn.ReLU(), nn.Linear(6, 6), nn.SiLU())
    saved(file, copy.deepcopy(base), granularity={"1": "layer", "3": "channel"})
    loaded = load_gates(base, file, example_input=X)
    assert [u.granularity for u in units(loaded).values()] == [PerLayer(), PerChannel(-1)]


def test_sites_that_were_not_converted_are_left_alone(file):
    base = chain(nn.ReLU(), nn.Linear(6, 6), nn.SiLU())
    saved(file, copy.deepcopy(base), source="silu")
    loaded = load_gates(base, file, example_input=X)
    assert list(units(loaded)) == ["3"]
    assert type(loaded[1]) is nn.ReLU


@pytest.mark.parametrize(
    "target",
    [
        "snake(a=0.1)",
        "hardtanh(min_val=-3, max_val=0.30000000000000004)",
        "polynomial(degree=4)",
        "clamp(min=-1e999, max=2.5)",
        "bump(width=0.7, mode='a (b) \\'c\\'', limits=(1, -2), top=3)",
        "silu(variant='x * sigmoid(x)')",
    ],
)
def test_activations_with_parameters_come_back_as_they_were(target, file, own_registry):
    register_bump()
    model = saved(file, target=target)
    assert load_gates(chain(), file, example_input=X)[1].target == model[1].target


def test_an_activation_that_text_cannot_hold_is_refused_when_saving(file):
    target = Activation("snake", (("a", 0.5j),))
    with pytest.raises(ValueError, match=r"^1: 'snake\(a=0.5j\)' does not read back"):
        saved(file, target=target)
    assert not list(file.parent.iterdir())


def test_a_base_of_another_dtype_takes_the_gates_in_float32(file):
    base = chain().eval()
    model = saved(file, copy.deepcopy(base)).to(torch.bfloat16).eval()
    loaded = load_gates(base.to(torch.bfloat16), file, example_input=X.bfloat16())
    assert loaded[1].log_alpha.dtype == torch.float32
    assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))


def test_the_optimizers_state_finds_its_parameters_also_after_a_plan_in_another_order(file):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.silu(F.gelu(self.linear(F.relu(x))))

    plan = find_activations(Net(), X)
    plan = dataclasses.replace(plan, rows=plan.rows[::-1])
    model = convert(Net(), plan=plan)
    save_gates(model, file)
    names = [name for name, _ in model.named_parameters()]
    assert names[-1] == "relu_0.gate.log_alpha"
    loaded = load_gates(Net(), file, example_input=X)
    assert [name for name, _ in loaded.named_parameters()] == names


def test_the_file_has_the_names_of_the_state_dict(file):
    model = saved(file, Body())
    fresh = convert(Body(), example_input=X)
    keys = fresh.load_state_dict(load_file(file), strict=False)
    assert not keys.unexpected_keys
    assert not any("gate" in key for key in keys.missing_keys)
    for path, unit in units(model).items():
        assert torch.equal(units(fresh)[path].log_alpha, unit.log_alpha)


# --- into a converted model ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard_concrete", "line"])
def test_a_converted_model_takes_the_values_and_its_optimizer_goes_on(kind, file):
    saved_gate = saved(file, gate=kind)[1].gate
    model = convert(chain(), example_input=X, gate=kind)
    optimizer = torch.optim.Adam(model.parameters())
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(4, start=0.0, end=1.0))
    before = everything(model)[0], [id(tensor) for tensor in model.parameters()]
    assert load_gates(model, file) is model
    assert (everything(model)[0], [id(tensor) for tensor in model.parameters()]) == before
    for name, value in saved_gate.state_dict().items():
        assert torch.equal(model[1].gate.state_dict()[name], value)
    for _ in range(4):
        model(X).sum().backward()
        optimizer.step()
    assert (model[1].gate.predict() == 0).all()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compiled part": lambda model: nn.Sequential(
        torch.compile(model[0], backend="eager"), *model[1:]
    ),
}


def body_and_relu():
    return nn.Sequential(Body(), nn.ReLU())


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_have_the_paths_of_the_plain_one(wrap, file):
    model = convert(body_and_relu(), example_input=X)
    wrapped = wrap(model)
    save_gates(spread(wrapped), file)
    loaded = load_gates(body_and_relu(), file, example_input=X)
    assert list(units(loaded)) == list(units(model))
    other = wrap(convert(body_and_relu(), example_input=X))
    assert load_gates(other, file) is other
    for one, two, three in zip(*(units(m).values() for m in (wrapped, loaded, other)), strict=True):
        assert torch.equal(one.log_alpha, two.log_alpha)
        assert torch.equal(one.log_alpha, three.log_alpha)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("fold", [None, X], ids=["", "fold"])
@torch.no_grad()
def test_wrapped_models_are_baked_as_the_plain_one(fold, wrap, file):
    spec = ModelSpec(f"{__file__}:body_and_relu", {}, (4,))
    model = become(convert(body_and_relu(), example_input=X).eval(), match, mix, keep)
    wrapped, plain = wrap(model), file.with_name("plain")
    found = save_baked(wrapped, file, spec, fold=fold)
    expected = save_baked(model, plain, spec, fold=fold)
    assert [plain_path(row.path) for row in found or ()] == [row.path for row in expected or ()]
    assert list(load_file(file)) == list(load_file(plain))
    assert torch.equal(load_baked(file).eval()(X), load_baked(plain).eval()(X))
    assert units(wrapped)


def test_a_wrapped_base_model_is_refused(file):
    saved(file)
    refuses(TypeError, "before torch.compile", torch.compile(chain()), file)


def test_neurons_that_a_budget_has_counted_come_back(tmp_path):
    """A model that was converted without an example counts those of a photograph."""
    x = torch.randn(8, 3, 12, 12)

    def network():
        torch.manual_seed(0)
        return convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "square")

    model = swap_targets(network(), keep=200, batches=[x])
    save_gates(model, tmp_path / "gates.safetensors")
    other = load_gates(network(), tmp_path / "gates.safetensors")
    assert report(other).total.neurons == report(model).total.neurons == 4 * 10**2
