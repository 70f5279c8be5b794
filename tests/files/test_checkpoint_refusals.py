"""load_gates refuses other models, damaged and foreign folders, and changes nothing then."""

import copy
import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.checkpoints import (
    Calls,
    CallsOneMore,
    WhenTraining,
    X,
    chain,
    refuses,
    register_bump,
    saved,
)
from transfer_surgery import (
    HardConcrete,
    convert,
    find_activations,
    load_gates,
    register_gate,
    save_gates,
)
from transfer_surgery.activations import registry as activations
from transfer_surgery.units import gates

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
        ({"gate": HardConcrete(noise="example")}, "1: noise batch in the checkpoint, example here"),
        ({"gate": HardConcrete(temperature=0.5)}, "1: temperature 0.666.* 0.5 here"),
        ({"gate": HardConcrete(stretch=(-0.2, 1.2))}, "1: stretch .* here"),
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


def test_activations_and_gates_that_are_not_registered_are_named(
    tmp_path, monkeypatch, own_registry
):
    register_bump()
    monkeypatch.setattr(gates, "_REGISTRY", dict(gates._REGISTRY))

    @dataclasses.dataclass(frozen=True)
    class MySettings(HardConcrete):
        pass

    @register_gate("checkpoint_gate", MySettings)
    class Mine(gates.HardConcreteGate):
        pass

    saved(tmp_path, target="bump(width=2.0)", gate="checkpoint_gate")
    model = chain()
    monkeypatch.delitem(gates._REGISTRY, "checkpoint_gate")
    refuses(ValueError, "gate 'checkpoint_gate', which .* register_gate for it", model, tmp_path)
    monkeypatch.setitem(gates._REGISTRY, "checkpoint_gate", Mine)
    entry = activations._REGISTRY["bump"]
    monkeypatch.delitem(activations._REGISTRY, "bump")
    message = "activation 'bump', which .* register_activation for it"
    refuses(ValueError, message, model, tmp_path)
    monkeypatch.setitem(activations._REGISTRY, "bump", dataclasses.replace(entry, defaults={}))
    refuses(ValueError, "'bump' has no parameter 'width'", model, tmp_path)


def test_gates_on_the_meta_device_are_refused(tmp_path):
    saved(tmp_path)
    model = convert(chain(), example_input=X).to("meta")
    with pytest.raises(ValueError, match=r"1\.gate\.log_alpha is on the meta device"):
        load_gates(model, tmp_path)
