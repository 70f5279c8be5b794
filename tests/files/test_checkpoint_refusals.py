"""load_gates refuses other models, damaged and foreign files, and changes nothing then."""

import copy
import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
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
from transfer_surgery.files import read_gates
from transfer_surgery.units import gates
from transfer_surgery.units.gate_kinds import HardConcreteGate

# --- sites that differ ---------------------------------------------------------------------------


def wide():
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))


def convolution():
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 6, 1), nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: chain(nn.SiLU()), r"1: source relu in the file, silu here"),
        (wide, r"1: shape \[6\] in the file, \[7\] here"),
        (lambda: chain(nn.Identity()), "1: there is no such site here"),
        (lambda: chain(nn.LeakyReLU(0.3)), r"leaky_relu\(negative_slope=0\.3\) here"),
        (lambda: chain(nn.RReLU()), "1: .* here"),
    ],
)
def test_a_base_model_with_other_sites_is_refused_and_they_are_named(base, message, file):
    saved(file)
    text = refuses(ValueError, message, base(), file)
    assert "1 of the sites of this Sequential" in text
    assert f"not those of {file}, which has 1 sites" in text


def test_all_sites_that_differ_are_named_up_to_twenty(file):
    saved(file, nn.Sequential(*[nn.ReLU() for _ in range(25)]))
    model = nn.Sequential(*[nn.ReLU() if i == 3 else nn.Tanh() for i in range(25)])
    text = refuses(ValueError, "24 of the sites", model, file)
    assert "\n  0: " in text
    assert "\n  3: " not in text
    assert "... and 4 more" in text


def test_another_axis_of_the_channels_is_refused(file):
    class Net(nn.Module):
        def __init__(self, axis):
            super().__init__()
            self.pre = nn.Conv1d(4, 4, 1) if axis == 1 else nn.Linear(4, 4)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.pre(x))

    x = torch.zeros(2, 4, 4)
    save_gates(convert(Net(1), example_input=x), file)
    message = "act: axis 1 in the file, -1 here"
    refuses(ValueError, message, Net(-1), file, example_input=x)
    save_gates(convert(Net(1), granularity="layer", example_input=x), file)
    load_gates(Net(-1), file, example_input=x)


def test_a_name_that_means_another_call_by_now_is_refused(file):
    saved(file, Calls())
    message = r"relu_0: call \[1, 2\] in the file, \[1, 3\] here"
    text = refuses(ValueError, message, CallsOneMore(), file)
    assert r"gelu_0: call [2, 2] in the file, [3, 3] here" in text


def test_names_given_in_another_order_of_modes_are_refused(file):
    plan = find_activations(WhenTraining(), X, modes=("train", "eval"))
    save_gates(convert(WhenTraining(), plan=plan), file)
    refuses(ValueError, r"relu_0: call \[1, 2\] in the file, \[2, 2\]", WhenTraining(), file)
    load_gates(convert(WhenTraining(), plan=plan), file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cos"}, "1: target sin in the file, cos here"),
        ({"gate": "bernoulli"}, "1: gate hard_concrete in the file, bernoulli here"),
        ({"granularity": "layer"}, r"granularity channel .*; shape \[6\] .*, \[1\] here"),
        ({"gate": HardConcrete(noise="example")}, "1: noise batch in the file, example here"),
        ({"gate": HardConcrete(temperature=0.5)}, "1: temperature 0.666.* 0.5 here"),
        ({"gate": HardConcrete(stretch=(-0.2, 1.2))}, "1: stretch .* here"),
    ],
)
def test_a_model_converted_in_another_way_is_refused(options, message, file):
    saved(file)
    refuses(ValueError, message, convert(chain(), example_input=X, **options), file)


def test_a_converted_model_with_more_or_fewer_sites_is_refused(file):
    base = chain(nn.ReLU(), nn.Linear(6, 6), nn.SiLU())
    one, two = file, file.with_name("two.safetensors")
    model = saved(one, copy.deepcopy(base), source="silu")
    both = saved(two, base)
    refuses(ValueError, "1: it has gates here and none in the file", both, one)
    refuses(ValueError, "1: there is no such site here", model, two)


# --- damaged and foreign files -------------------------------------------------------------------


def rewrite(file, change, tensors=None):
    """Save a file again with another description, or with other tensors."""
    with safe_open(file, "pt") as opened:
        held = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        about = json.loads(opened.metadata()["transfer_surgery"])
    about = change(about) or about
    save_file(held if tensors is None else tensors, file, {"transfer_surgery": json.dumps(about)})


def edit(**changes):
    return lambda file: rewrite(file, lambda about: about.update(changes))


def edit_site(**changes):
    return lambda file: rewrite(file, lambda about: about["sites"]["1"].update(changes))


def without_a_field(file):
    rewrite(file, lambda about: about["sites"]["1"].pop("position") and None)


def deep(file):
    save_file({"x": torch.zeros(1)}, file, {"transfer_surgery": "[" * 100_000})


def cut(length):
    return lambda file: file.write_bytes(file.read_bytes()[:length])


DAMAGES = {
    "cut values": (cut(-4), "is damaged, or is not a safetensors file"),
    "cut header": (cut(20), "is damaged, or is not a safetensors file"),
    "empty": (cut(0), "is damaged, or is not a safetensors file"),
    "a pickle": (lambda f: f.write_bytes(pickle.dumps(Explosive())), "is damaged"),
    "deep": (deep, "is damaged"),
    "another program": (lambda f: save_file({}, f, {"format": "pt"}), "written by another program"),
    "a list": (lambda f: rewrite(f, lambda about: [about]), "written by another program"),
    "newer": (edit(version=2), "has version 2, and .* reads versions up to 1: upgrade"),
    "version 0": (edit(version=0), "is damaged: no file has version 0"),
    "no version": (edit(version=None), "written by another program"),
    "baked": (edit(kind="baked"), "holds 'baked', not gates or model"),
    "no sites": (edit(sites={}), "it does not describe its sites"),
    "sites of a list": (edit(sites=["1"]), "it does not describe its sites"),
    "no dict": (edit(sites={"1": []}), "it does not describe its sites"),
    "a missing field": (without_a_field, "position"),
    "a field too many": (edit_site(color="red"), "color"),
    "a wrong type": (edit_site(shape=6), "shape 6 in the file"),
    "a wrong word": (edit_site(granularity=[]), r"its granularity in the file is \[\]"),
    "axis of text": (
        edit_site(granularity={"name": "channel", "axis": "1", "found": True}),
        "1.*'axis': '1'|the site '1' cannot be built: .*'1'",
    ),
    "a text": (edit_site(neurons="many"), "the site '1' cannot be built: .*'many'"),
    "a flag": (edit_site(fitted="yes"), "the site '1' cannot be built: fitted is 'yes'"),
    "too many gates": (
        edit_site(shape=[10**13], gate={"name": "line"}),
        r"1: .*shape \[10000000000000\] in",
    ),
    "too many learned": (edit_site(shape=[10**13]), r"1: shape \[10000000000000\] in"),
    "far too many": (edit_site(shape=[10**18, 10**18]), "1: shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_files_are_refused(damage, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(file)
    change, message = DAMAGES[damage]
    change(file)
    text = refuses(ValueError, message, chain(), file)
    assert str(file) in text
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_gates(file)  # where no model tells what the sites are
    if damage not in ("a missing field", "a text"):  # a converted model has these itself
        refuses(ValueError, re.escape(str(file)), convert(chain(), example_input=X), file)
    assert not Path("exploded").exists()


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_missing_files_and_folders_are_refused(file):
    refuses(FileNotFoundError, "saved.safetensors does not exist", chain(), file)
    refuses(FileNotFoundError, "is a folder", chain(), file.parent)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"1.gate.log_alpha": torch.zeros(7)}, r"log_alpha is torch.float32 of shape \(7,\); the"),
        ({"1.gate.log_alpha": torch.zeros(6, dtype=torch.int32)}, "log_alpha is torch.int32 of"),
        ({"2.gate.log_alpha": torch.zeros(6)}, "1.gate.log_alpha is missing; the gates"),
        ({"1.gate.log_alpha": torch.zeros(6), "x": torch.zeros(1)}, "x is torch.* need missing"),
        ({"1.gate.log_alpha": torch.full((6,), torch.nan)}, "values that are not a number"),
    ],
)
def test_values_that_do_not_fit_the_sites_are_refused(tensors, message, file):
    saved(file)
    rewrite(file, lambda about: about, tensors)
    refuses(ValueError, message, chain(), file)
    refuses(ValueError, message, convert(chain(), example_input=X), file)
    with pytest.raises(ValueError, match=message):
        read_gates(file)


def test_activations_and_gates_that_are_not_registered_are_named(file, monkeypatch, own_registry):
    register_bump()
    monkeypatch.setattr(gates, "_REGISTRY", dict(gates._REGISTRY))

    @dataclasses.dataclass(frozen=True)
    class MySettings(HardConcrete):
        pass

    @register_gate("checkpoint_gate", MySettings)
    class Mine(HardConcreteGate):
        pass

    saved(file, target="bump(width=2.0)", gate="checkpoint_gate")
    model = chain()
    monkeypatch.delitem(gates._REGISTRY, "checkpoint_gate")
    refuses(ValueError, "unknown gate 'checkpoint_gate'.* @register_gate", model, file)
    monkeypatch.setitem(gates._REGISTRY, "checkpoint_gate", Mine)
    entry = activations._REGISTRY["bump"]
    del activations._REGISTRY["bump"]
    message = "unknown activation 'bump.* @register_activation"
    refuses(ValueError, message, model, file)
    activations._REGISTRY["bump"] = dataclasses.replace(entry, defaults={})
    refuses(ValueError, "'bump' has no parameter 'width'", model, file)


def test_gates_on_the_meta_device_are_refused(file):
    saved(file)
    model = convert(chain(), example_input=X).to("meta")
    with pytest.raises(ValueError, match="the gates are on the meta device"):
        load_gates(model, file)
