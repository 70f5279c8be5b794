"""Settings are read from a command line in their own type; wrong ones are refused."""

import json
from dataclasses import replace

import pytest
from protocol import Protocol

PLAIN = Protocol(epochs=3)


def test_defaults_are_those_of_section_4_2():
    assert (PLAIN.batch_size, PLAIN.lr, PLAIN.momentum, PLAIN.weight_decay) == (128, 0.1, 0.9, 1e-4)
    assert PLAIN.sin_std == 0.1


def test_settings_are_read_in_their_own_type_and_the_last_one_counts():
    changed = PLAIN.changed(["gamma=2", "epochs=7", "noise=example", "lr=1e-3", "gamma=3"])
    assert changed == replace(PLAIN, gamma=3.0, epochs=7, noise="example", lr=1e-3)
    assert (type(changed.gamma), type(changed.epochs)) == (float, int)
    decay = PLAIN.changed(["gate_weight_decay=0"])
    assert decay.gate_weight_decay == 0.0
    assert decay.changed(["gate_weight_decay=None"]) == PLAIN
    assert Protocol(**json.loads(json.dumps(changed.to_dict()))) == changed


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("gamma", "write NAME=VALUE, where NAME is one of epochs, batch_size, lr"),
        ("gama=1", "'gama=1': write NAME=VALUE"),
        ("epochs=1.5", "epochs=1.5: give a value of type int"),
        ("epochs=True", "epochs=True: give a value of type int"),
        ("gamma=much", "gamma=much: give a value of type float"),
        ("lr=None", "lr=None: give a value of type float"),
        ("epochs=0", "epochs=0.*must be positive"),
        ("restart=-1", "restart=-1"),
        ("kaiming=he", "kaiming='he': use 'torch' or 'normal'"),
    ],
)
def test_what_is_no_setting_is_refused_with_what_to_write(assignment, message):
    with pytest.raises(ValueError, match=message):
        PLAIN.changed([assignment])
