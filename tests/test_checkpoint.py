"""Promises of save_gates and load_gates: what was saved comes back, or nothing happens."""

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from promises import Body, units
from safetensors.torch import load_file
from torch import nn

from transfer_surgery import (
    TransferSchedule,
    convert,
    find_activations,
    load_gates,
    register_activation,
    register_gate,
    save_gates,
    wrap_optimizer,
)
from transfer_surgery.activations import _REGISTRY, get_activation
from transfer_surgery.gate_config import GateConfig
from transfer_surgery.gates import _REGISTRY as _GATES
from transfer_surgery.gates import HardConcreteGate
from transfer_surgery.site_config import SiteConfig

X = torch.linspace(-3, 3, 2 * 4).reshape(2, 4)


class Calls(nn.Linear):
    """Two functions in one forward: fx rewrites it."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        x = F.relu(x)
        return F.gelu(super().forward(x))


class CallsOneMore(Calls):
    """The same after an edit: what was relu_0 is relu_1 now."""

    def forward(self, x):
        x = F.relu(x + 0.5)
        x = F.relu(x)
        return F.gelu(nn.Linear.forward(self, x))


class Dispatched(nn.Linear):
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


class WhenTraining(nn.Module):
    """Its calls come in another order in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            x = F.relu(self.b(x))
        return F.relu(self.a(x))


def chain(*middle):
    return nn.Sequential(nn.Linear(4, 6), *(middle or (nn.ReLU(),)), nn.Linear(6, 2))


IMAGE = torch.linspace(-2, 2, 2 * 3 * 160 * 160).reshape(2, 3, 160, 160)
MODELS = {
    "fx": (Calls, X),
    "reused": (Body, X),
    "dispatch": (Dispatched, X),
    "two names": (TwoNames, X),
    "training": (WhenTraining, X),
    "root sequential": (chain, X),
    "prelu": (lambda: chain(nn.PReLU()), X),
    "timm resnet": (lambda: timm.create_model("test_resnet"), IMAGE),
    "timm vit": (lambda: timm.create_model("test_vit"), IMAGE),
}


def spread(model, seed=1):
    """Gates everywhere between source and target."""
    generator = torch.Generator().manual_seed(seed)
    for unit in units(model).values():
        for tensor in (*unit.gate.parameters(), *unit.gate.buffers()):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator).mul(3).abs())
    return model


def saved(folder, model=None, **options):
    model = convert(chain() if model is None else model, example_input=X, **options)
    save_gates(spread(model), folder)
    return model


def everything(model):
    """What must not change when a load fails: objects, classes and values."""
    state = model.state_dict(keep_vars=True)
    return (
        {id(m): (type(m), list(m._modules.values())) for m in model.modules()},
        [(name, id(tensor), tensor.detach().clone().tolist()) for name, tensor in state.items()],
    )


def refuses(error, match, model, folder, **options):
    before, random = everything(model), torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        load_gates(model, folder, **({"example_input": X} | options))
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    return str(caught.value)


# --- what was saved comes back -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_fresh_base_model_becomes_the_saved_one_bit_for_bit(name, tmp_path):
    make, x = MODELS[name]
    base = make().eval()
    model = spread(convert(copy.deepcopy(base), "snake(a=0.5)", example_input=x))
    save_gates(model, tmp_path)
    random = torch.get_rng_state()
    loaded = load_gates(base, tmp_path, example_input=x)
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
        for field in ("source", "target", "granularity", "channel_axis", "neurons"):
            assert getattr(again, field) == getattr(unit, field)
        assert (again.depth, again.stage) == (unit.depth, unit.stage)
        assert again.overwrites_input == unit.overwrites_input
        assert again.training == unit.training


def test_zoo_models_need_no_example_input(tmp_path):
    model = convert(timm.create_model("test_resnet"))
    save_gates(spread(model), tmp_path)
    loaded = load_gates(timm.create_model("test_resnet"), tmp_path)
    for path, unit in units(model).items():
        assert torch.equal(units(loaded)[path].log_alpha, unit.log_alpha)


@pytest.mark.parametrize("kind", ["hard_concrete", "bernoulli", "line", "copy"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_every_kind_of_gate_comes_back_with_its_settings(kind, granularity, tmp_path):
    settings = {"noise": "example", "temperature": 0.3, "stretch": (-0.25, 1.5)}
    model = saved(tmp_path, gate=kind, granularity=granularity, **settings)
    gate, again = model[1].gate, load_gates(chain(), tmp_path, example_input=X)[1].gate
    assert type(again) is type(gate)
    assert (again.shape, again.noise) == (gate.shape, "example")
    assert (again.temperature, again.stretch) == (0.3, (-0.25, 1.5))
    assert again.state_dict().keys() == gate.state_dict().keys()
    for name, value in gate.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.log_alpha.requires_grad if gate.learned else again.progress > 0


def test_each_site_keeps_its_own_settings(tmp_path):
    base = chain(nn.ReLU(), nn.Linear(6, 6), nn.SiLU())
    saved(tmp_path, copy.deepcopy(base), granularity={"1": "layer", "3": "channel"})
    loaded = load_gates(base, tmp_path, example_input=X)
    assert [u.granularity for u in units(loaded).values()] == ["layer", "channel"]


def test_sites_that_were_not_converted_are_left_alone(tmp_path):
    base = chain(nn.ReLU(), nn.Linear(6, 6), nn.SiLU())
    saved(tmp_path, copy.deepcopy(base), source="silu")
    loaded = load_gates(base, tmp_path, example_input=X)
    assert list(units(loaded)) == ["3"]
    assert type(loaded[1]) is nn.ReLU


@register_activation("checkpoint_test")
def _registered(x, width=1.0, mode="plain", limits=(0, 1), top=float("inf")):
    return torch.exp(-((x / width) ** 2)).clamp(max=top)


@pytest.mark.parametrize(
    "target",
    [
        "snake(a=0.1)",
        "polynomial(a=1e-07, b=-3, c=0.30000000000000004)",
        "clamp(min=-1e999, max=2.5)",
        "checkpoint_test(width=0.7, mode='a (b) \\'c\\'', limits=(1, -2), top=3)",
        "silu(written='x * sigmoid(x)')",
    ],
)
def test_activations_with_parameters_come_back_as_they_were(target, tmp_path):
    model = saved(tmp_path, target=target)
    assert load_gates(chain(), tmp_path, example_input=X)[1].target == model[1].target


def test_an_activation_that_text_cannot_hold_is_refused_when_saving(tmp_path):
    target = get_activation("snake", a=float("nan"))
    with pytest.raises(ValueError, match=r"^1: 'snake\(a=nan\)' does not read back"):
        saved(tmp_path, target=target)
    assert not list(tmp_path.iterdir())


def test_a_base_of_another_dtype_takes_the_gates_in_float32(tmp_path):
    base = chain().eval()
    model = saved(tmp_path, copy.deepcopy(base)).to(torch.bfloat16).eval()
    loaded = load_gates(base.to(torch.bfloat16), tmp_path, example_input=X.bfloat16())
    assert loaded[1].log_alpha.dtype == torch.float32
    assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))


def test_the_optimizers_state_finds_its_parameters_also_after_a_plan_in_another_order(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.silu(F.gelu(self.linear(F.relu(x))))

    plan = find_activations(Net(), X)
    plan = dataclasses.replace(plan, sites=plan.sites[::-1])
    model = convert(Net(), plan=plan)
    save_gates(model, tmp_path)
    names = [name for name, _ in model.named_parameters()]
    assert names[-1] == "relu_0.gate.log_alpha"
    loaded = load_gates(Net(), tmp_path, example_input=X)
    assert [name for name, _ in loaded.named_parameters()] == names


def test_the_file_has_the_names_of_the_state_dict(tmp_path):
    model = saved(tmp_path, Body())
    fresh = convert(Body(), example_input=X)
    keys = fresh.load_state_dict(load_file(tmp_path / "gates.safetensors"), strict=False)
    assert not keys.unexpected_keys
    assert not any("gate" in key for key in keys.missing_keys)
    for path, unit in units(model).items():
        assert torch.equal(units(fresh)[path].log_alpha, unit.log_alpha)


@given(
    st.builds(
        SiteConfig,
        granularity=st.sampled_from(["layer", "channel", "neuron"]),
        shape=st.lists(st.integers(1)).map(tuple),
        call=st.none() | st.tuples(st.integers(), st.integers()),
        temperature=st.floats(0, 1),
        stretch=st.tuples(st.floats(-9, 0), st.floats(1, 9)),
    )
)
def test_configs_turn_to_json_and_back(site):
    config = GateConfig("Model", (site,))
    assert GateConfig.from_json(config.to_json()) == config
    assert not site.difference(site)


# --- into a converted model ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard_concrete", "line"])
def test_a_converted_model_takes_the_values_and_its_optimizer_goes_on(kind, tmp_path):
    saved_gate = saved(tmp_path, gate=kind)[1].gate
    model = convert(chain(), example_input=X, gate=kind)
    optimizer = torch.optim.Adam(model.parameters())
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(4, start=0.0, end=1.0))
    before = everything(model)[0], [id(tensor) for tensor in model.parameters()]
    assert load_gates(model, tmp_path) is model
    assert (everything(model)[0], [id(tensor) for tensor in model.parameters()]) == before
    for name, value in saved_gate.state_dict().items():
        assert torch.equal(model[1].gate.state_dict()[name], value)
    for _ in range(4):
        model(X).sum().backward()
        optimizer.step()
    assert (model[1].gate.predict() == 0).all()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.Sequential(torch.compile(model[0]), *model[1:]),
    ],
    ids=["DataParallel", "AveragedModel", "compile", "compiled part"],
)
def test_wrapped_models_have_the_paths_of_the_plain_one(wrap, tmp_path):
    def make():
        return nn.Sequential(Body(), nn.ReLU())

    model = convert(make(), example_input=X)
    wrapped = wrap(model)
    save_gates(spread(wrapped), tmp_path)
    loaded = load_gates(make(), tmp_path, example_input=X)
    assert list(units(loaded)) == list(units(model))
    other = wrap(convert(make(), example_input=X))
    assert load_gates(other, tmp_path) is other
    for one, two, three in zip(*(units(m).values() for m in (wrapped, loaded, other)), strict=True):
        assert torch.equal(one.log_alpha, two.log_alpha)
        assert torch.equal(one.log_alpha, three.log_alpha)


def test_a_wrapped_base_model_is_refused(tmp_path):
    saved(tmp_path)
    refuses(TypeError, "before torch.compile", torch.compile(chain()), tmp_path)


# --- sites that differ ---------------------------------------------------------------------------


def wide():
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))


def convolution():
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 6, 1), nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: chain(nn.SiLU()), r"1: source relu in the checkpoint, silu here"),
        (wide, r"1: shape \(6,\) in the checkpoint, \(7,\) here"),
        (lambda: chain(nn.Identity()), "1: there is no such site here"),
        (lambda: chain(nn.LeakyReLU(0.3)), r"leaky_relu\(negative_slope=0\.3\) here"),
        (lambda: chain(nn.RReLU()), "1: .* here"),
    ],
)
def test_a_base_model_with_other_sites_is_refused_and_they_are_named(base, message, tmp_path):
    saved(tmp_path)
    text = refuses(ValueError, message, base(), tmp_path)
    assert "1 of the sites of this Sequential" in text
    assert "a Sequential with 1 sites" in text


def test_all_sites_that_differ_are_named_up_to_twenty(tmp_path):
    saved(tmp_path, nn.Sequential(*[nn.ReLU() for _ in range(25)]))
    model = nn.Sequential(*[nn.ReLU() if i == 3 else nn.Tanh() for i in range(25)])
    text = refuses(ValueError, "24 of the sites", model, tmp_path)
    assert "\n  0: " in text
    assert "\n  3: " not in text
    assert "... and 4 more" in text


def test_another_axis_of_the_channels_is_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self, axis):
            super().__init__()
            self.pre = nn.Conv1d(4, 4, 1) if axis == 1 else nn.Linear(4, 4)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.pre(x))

    x = torch.zeros(2, 4, 4)
    save_gates(convert(Net(1), example_input=x), tmp_path)
    message = "act: channel_axis 1 in the checkpoint, -1 here"
    refuses(ValueError, message, Net(-1), tmp_path, example_input=x)
    save_gates(convert(Net(1), granularity="layer", example_input=x), tmp_path / "layer")
    load_gates(Net(-1), tmp_path / "layer", example_input=x)


def test_a_name_that_means_another_call_by_now_is_refused(tmp_path):
    saved(tmp_path, Calls())
    message = r"relu_0: call \(1, 2\) in the checkpoint, \(1, 3\) here"
    text = refuses(ValueError, message, CallsOneMore(), tmp_path)
    assert r"gelu_0: call (2, 2) in the checkpoint, (3, 3) here" in text


def test_names_given_in_another_order_of_modes_are_refused(tmp_path):
    plan = find_activations(WhenTraining(), X, modes=("train", "eval"))
    save_gates(convert(WhenTraining(), plan=plan), tmp_path)
    refuses(
        ValueError, r"relu_0: call \(1, 2\) in the checkpoint, \(2, 2\)", WhenTraining(), tmp_path
    )
    load_gates(convert(WhenTraining(), plan=plan), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cos"}, "1: target sin in the checkpoint, cos here"),
        ({"gate": "bernoulli"}, "1: gate hard_concrete in the checkpoint, bernoulli here"),
        ({"granularity": "layer"}, r"granularity channel .*; shape \(6,\) .*, \(1,\) here"),
        ({"noise": "example"}, "1: noise batch in the checkpoint, example here"),
        ({"temperature": 0.5}, "1: temperature 0.666.* 0.5 here"),
        ({"stretch": (-0.2, 1.2)}, "1: stretch .* here"),
    ],
)
def test_a_model_converted_in_another_way_is_refused(options, message, tmp_path):
    saved(tmp_path)
    refuses(ValueError, message, convert(chain(), example_input=X, **options), tmp_path)


def test_a_converted_model_with_more_or_fewer_sites_is_refused(tmp_path):
    base = chain(nn.ReLU(), nn.Linear(6, 6), nn.SiLU())
    one, two = tmp_path / "one", tmp_path / "two"
    model = saved(one, copy.deepcopy(base), source="silu")
    both = saved(two, base)
    refuses(ValueError, "1: has gates here, none in the checkpoint", both, one)
    refuses(ValueError, "1: there is no such site here", model, two)


# --- folders that are no checkpoints -------------------------------------------------------------


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_site(folder, **changes):
    site = json.loads((folder / "config.json").read_text())["sites"][0]
    edit(folder, sites=[site | changes])


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


def foreign(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


DAMAGES = {
    "cut config": (lambda f: cut(f / "config.json", 100), "config.json is no checkpoint of gates"),
    "empty config": (lambda f: cut(f / "config.json", 0), "config.json is no checkpoint of gates"),
    "binary config": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
        "config.json is no",
    ),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is no"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "written by another program"),
    "another program": (foreign, "written by another program"),
    "newer": (lambda f: edit(f, version=3), "version 3, .* reads up to 2: upgrade"),
    "no version": (lambda f: edit(f, version=None), "its version or its list of sites is missing"),
    "no sites": (lambda f: edit(f, sites=[]), "it has no sites"),
    "a missing field": (
        lambda f: edit(f, sites=[{"path": "1"}]),
        "expected the fields path, source",
    ),
    "a field too many": (lambda f: edit_site(f, color="red"), "expected the fields path, source"),
    "a wrong type": (lambda f: edit_site(f, shape=6), "site '1': shape is 6"),
    "a wrong word": (lambda f: edit_site(f, granularity=[]), r"site '1': granularity is \[\]"),
    "other numbers": (lambda f: edit_site(f, neurons=7), "are of different saves"),
    "cut gates": (lambda f: cut(f / "gates.safetensors", -4), "gates.safetensors is damaged"),
    "cut header": (lambda f: cut(f / "gates.safetensors", 20), "gates.safetensors is damaged"),
    "empty gates": (lambda f: cut(f / "gates.safetensors", 0), "gates.safetensors is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("converted", [False, True], ids=["base", "converted"])
def test_damaged_and_foreign_files_are_refused(damage, converted, tmp_path):
    saved(tmp_path)
    change, message = DAMAGES[damage]
    change(tmp_path)
    model = convert(chain(), example_input=X) if converted else chain()
    refuses(ValueError, message, model, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no config.json.* It holds: nothing"),
        (["adapter_config.json", "adapter_model.safetensors"], "It holds: adapter_config.json, ad"),
        (["config.json"], "holds no gates.safetensors"),
    ],
)
def test_folders_without_the_files_say_what_they_hold(names, message, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    refuses(FileNotFoundError, message, chain(), tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    refuses(FileNotFoundError, "none is no folder", chain(), tmp_path / "none")


def test_values_that_do_not_fit_the_config_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    saved(tmp_path)
    file = tmp_path / "gates.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for tensors, message in (
        ({"1.gate.log_alpha": torch.zeros(7)}, r"log_alpha is torch.float32 of shape \(7,\); the"),
        ({"1.gate.log_alpha": torch.zeros(6, dtype=torch.int32)}, "log_alpha is torch.int32 of"),
        ({"2.gate.log_alpha": torch.zeros(6)}, "1.gate.log_alpha is missing; the gates"),
        ({"1.gate.log_alpha": torch.zeros(6), "x": torch.zeros(1)}, "x is torch.* need missing"),
    ):
        save_file(tensors, file, metadata)
        refuses(ValueError, message, chain(), tmp_path)
        refuses(ValueError, message, convert(chain(), example_input=X), tmp_path)


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_in_disguise_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    for name in ("gates.safetensors", "config.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
        refuses(ValueError, "is damaged|is no checkpoint", chain(), tmp_path)
    assert not Path("exploded").exists()


def test_activations_and_gates_that_are_not_registered_are_named(tmp_path, monkeypatch):
    @register_gate("checkpoint_gate")
    class Mine(HardConcreteGate):
        pass

    saved(tmp_path, target="checkpoint_test(width=2.0)", gate="checkpoint_gate")
    model = chain()
    monkeypatch.delitem(_GATES, "checkpoint_gate")
    refuses(ValueError, "gate 'checkpoint_gate', which .* register_gate for it", model, tmp_path)
    monkeypatch.setitem(_GATES, "checkpoint_gate", Mine)
    entry = _REGISTRY["checkpoint_test"]
    monkeypatch.delitem(_REGISTRY, "checkpoint_test")
    message = "activation 'checkpoint_test', which .* register_activation for it"
    refuses(ValueError, message, model, tmp_path)
    monkeypatch.setitem(_REGISTRY, "checkpoint_test", dataclasses.replace(entry, defaults={}))
    refuses(ValueError, "'checkpoint_test' has no parameter 'width'", model, tmp_path)
    monkeypatch.undo()
    del _GATES["checkpoint_gate"]


def test_gates_on_the_meta_device_are_refused(tmp_path):
    saved(tmp_path)
    model = convert(chain(), example_input=X).to("meta")
    with pytest.raises(ValueError, match=r"1\.gate\.log_alpha is on the meta device"):
        load_gates(model, tmp_path)


# --- saving --------------------------------------------------------------------------------------


def test_a_model_without_gates_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"call convert\(model, \.\.\.\) first"):
        save_gates(chain(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_config_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    model = convert(chain(), example_input=X)
    with pytest.raises(ValueError, match=r"another program.* into a folder of their own"):
        save_gates(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_saving_again_replaces_what_was_there(tmp_path):
    saved(tmp_path, gate="line")
    saved(tmp_path)
    model = spread(convert(chain(), example_input=X), seed=2)
    save_gates(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "gates.safetensors"]
    loaded = load_gates(chain(), tmp_path, example_input=X)
    assert torch.equal(loaded[1].log_alpha, model[1].log_alpha)


# A process with torch in it is forked for each moment at which a save can be killed: whenever it
# opens or renames a file, and when a file has some length. Forking needs a process of one thread.
_KILLED_SAVES = """
import os, resource, signal, sys
import torch
from torch import nn
from transfer_surgery import convert, load_gates, save_gates

torch.set_num_threads(1)
X = torch.zeros(1, 4)

def base():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU())

def gates(number, target="sin"):
    model = convert(base(), target, example_input=X)
    model[1].log_alpha.data.fill_(number)
    return model

def kill_at(moment, folder):
    events = 0
    def watch(event, args):
        nonlocal events
        if event == "os.rename" or (event == "open" and str(args[0]).startswith(folder)):
            events += 1
            if events == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

def kill_at_length(length):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))

def is_killed(target, kill, moment):
    folder = os.path.join(sys.argv[1], f"{target} {kill.__name__} {moment}")
    save_gates(gates(1.0), folder)
    process = os.fork()
    if process == 0:
        kill(moment, folder) if kill is kill_at else kill(moment)
        save_gates(gates(2.0, target), folder)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    try:
        unit = load_gates(base(), folder, X)[1]
        print(target, unit.target, unit.log_alpha.unique().item())
    except ValueError as error:
        assert "are of different saves" in str(error), error
        print(target, "refused")
    return os.WIFSIGNALED(status)

for target in ("sin", "cos"):
    for length in range(0, 800, 100):
        is_killed(target, kill_at_length, length)
    moment = 1
    while is_killed(target, kill_at, moment):
        moment += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_gates(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", _KILLED_SAVES, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    same, other = ([state for to, state in lines if to == target] for target in ("sin", "cos"))
    assert same[0] == other[0] == "sin 1.0"
    assert set(same) == {"sin 1.0", "sin 2.0"}
    assert set(other) == {"sin 1.0", "refused", "cos 2.0"}
    assert same[-1] == "sin 2.0"
    assert other[-1] == "cos 2.0"


# --- safetensors is optional ---------------------------------------------------------------------


def test_without_safetensors_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    model = convert(chain(), example_input=X)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_gates, load_gates):
        with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[checkpoints\]'"):
            call(model, tmp_path)


def test_importing_the_package_does_not_need_safetensors():
    code = "import sys, transfer_surgery; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
