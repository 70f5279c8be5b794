"""Settings read from a command line, and the ten networks of section 4.1."""

import dataclasses
import json

import pytest
import torch

from transfer_surgery import report
from transfer_surgery.reproduce.networks import perceptron
from transfer_surgery.reproduce.protocol import Protocol
from transfer_surgery.reproduce.rows import ROWS, find_row

PLAIN = Protocol(epochs=3)


def test_defaults_are_those_of_section_4_2():
    assert (PLAIN.batch_size, PLAIN.lr, PLAIN.momentum, PLAIN.weight_decay) == (128, 0.1, 0.9, 1e-4)
    assert PLAIN.sin_std == 0.1


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("gamma=2", "gamma", 2.0),
        ("gamma=1e-3", "gamma", 1e-3),
        ("epochs=7", "epochs", 7),
        ("noise=example", "noise", "example"),
        ("granularity=neuron", "granularity", "neuron"),
        ("gate_weight_decay=0", "gate_weight_decay", 0.0),
        ("gate_weight_decay=None", "gate_weight_decay", None),
        ("kaiming=normal", "kaiming", "normal"),
    ],
)
def test_a_setting_is_read_in_its_own_type_and_the_others_stay(assignment, name, value):
    start = dataclasses.replace(PLAIN, gate_weight_decay=0.5)
    changed = start.changed([assignment])
    found = getattr(changed, name)
    assert found == value
    assert type(found) is type(value)
    assert changed == dataclasses.replace(start, **{name: value})


def test_several_settings_are_changed_together_and_the_last_one_counts():
    changed = PLAIN.changed(["gamma=2", "lr=0.5", "gamma=3"])
    assert changed == dataclasses.replace(PLAIN, gamma=3.0, lr=0.5)
    assert PLAIN.changed([]) == PLAIN


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("gamma", "write NAME=VALUE, where NAME is one of epochs, batch_size, lr"),
        ("gama=1", "'gama=1': write NAME=VALUE"),
        ("=1", "write NAME=VALUE"),
        ("epochs=1.5", "epochs=1.5: give a value of type int"),
        ("epochs=True", "epochs=True: give a value of type int"),
        ("gamma=much", "gamma=much: give a value of type float"),
        ("gamma=", "gamma=: give a value of type float"),
        ("lr=None", "lr=None: give a value of type float"),
        ("gate_weight_decay='0'", r"give a value of type float \| None"),
        ("epochs=0", "epochs=0.*must be positive"),
        ("batch_size=0", "batch_size=0.*must be positive"),
        ("lr=-1", "lr=-1.0: all must be positive"),
        ("restart=-1", "restart=-1"),
        ("restart_factor=0", "restart_factor=0"),
        ("clip=-0.1", "clip=-0.1"),
        ("gate_lr=0", "gate_lr=0.0"),
        ("kaiming=he", "kaiming='he': use 'torch' or 'normal'"),
    ],
)
def test_what_is_no_setting_is_refused_with_what_to_write(assignment, message):
    with pytest.raises(ValueError, match=message):
        PLAIN.changed([assignment])


def test_a_protocol_goes_through_json_and_back():
    protocol = PLAIN.changed(["gamma=2", "noise=none", "gate_weight_decay=0.1", "restart=2"])
    assert Protocol(**json.loads(json.dumps(protocol.to_dict()))) == protocol
    assert Protocol(**PLAIN.to_dict()) == PLAIN


# ---- the networks

NAMES = [
    "sin",
    "resin",
    "tanh",
    "relu",
    "Copy",
    "Line",
    "Bern",
    "resin->sin",
    "tanh->sin",
    "relu->sin",
]


def test_the_networks_are_those_of_section_4_1_in_its_order():
    assert [row.name for row in ROWS] == NAMES


def test_a_network_is_found_by_name_and_by_slug_in_any_case():
    assert len({row.slug for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert not set(row.slug) - set("abcdefghijklmnopqrstuvwxyz-")
        for name in (row.name, row.slug, row.name.upper()):
            assert find_row(name) is row
    with pytest.raises(ValueError, match=r"unknown network 'gelu'\. Known: sin, resin, tanh, "):
        find_row("gelu")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_a_network_has_its_own_source_and_the_gates_of_the_protocol(row):
    protocol = dataclasses.replace(PLAIN, granularity="layer", noise="example")
    model = row.convert(perceptron(row.source, 4), protocol, torch.zeros(2, 1))
    if row.gate is None:
        assert row.name == row.source == str(model[1].activation)
        return
    assert row.source == (row.name.split("->")[0] if "->" in row.name else "resin")
    for site in report(model):
        assert (site.source, site.target, site.granularity) == (row.source, "sin", "layer")
    assert (model[1].gate.settings.name, model[1].gate.settings.noise) == (row.gate, "example")
    assert row.learned == hasattr(model[1].gate, "log_alpha")
