"""Kinds of gates are registered, and their settings are checked and saved."""

import json
import math

import pytest

from transfer_surgery import Bernoulli, Copy, HardConcrete, Line, register_gate
from transfer_surgery.units import (
    gate_settings,
    make_gate,
)


@pytest.mark.parametrize(
    "settings",
    [HardConcrete("alpha", "example", 0.4, (-0.3, 1.2)), Bernoulli(noise="none"), Line(), Copy()],
    ids=str,
)
def test_settings_turn_to_json_and_back(settings):
    assert gate_settings(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zero"}, "init='zero': use 'log_alpha'"),
        ({"noise": "pixel"}, "noise='pixel': use 'batch', 'example' or 'none'"),
        ({"temperature": 0.0}, "temperature=0.0: it must lie between 0 and 1"),
        ({"temperature": 1.0}, "temperature=1.0: it must lie"),
        ({"temperature": math.nan}, "temperature=nan: it must lie"),
        ({"stretch": (0.0, 1.1)}, r"stretch=\(0.0, 1.1\): needs xi < 0 and zeta > 1"),
        ({"stretch": (-0.1, 1.0)}, "needs xi < 0 and zeta > 1"),
        ({"stretch": (-0.01, 1.001)}, "conversion would change the outputs"),
        ({"stretch": (-0.1, 1.0001)}, "conversion would change the outputs"),
        ({"stretch": (-math.inf, math.inf)}, "conversion would change the outputs"),
    ],
)
def test_bad_settings_are_refused_with_what_is_right(options, message):
    with pytest.raises(ValueError, match=message):
        HardConcrete(**options)


class Mine(Line):
    """Settings without a gate."""


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        (make_gate, "soft", r"unknown gate 'soft'\. Known: bernoulli, .*line.*Add"),
        (make_gate, HardConcrete, r"write HardConcrete\(\)"),
        (make_gate, Mine(), r"Mine has no gate: put @register_gate\(name, Mine\)"),
        (register_gate, "line", "'line' is already registered; choose another name"),
        (register_gate, "another", "Line has the gate 'line' already"),
        (gate_settings, {"name": "line", "noise": "none"}, "'line': .*unexpected keyword .*noise'"),
        (gate_settings, {"name": "hard_concrete", "temperature": "x"}, "gate 'hard_concrete': "),
        (gate_settings, {"name": "hard_concrete", "stretch": [0]}, r"stretch=\[0\]"),
        (gate_settings, {}, "unknown gate None"),
    ],
)
def test_what_is_no_gate_is_refused_with_what_is_right(call, argument, message):
    with pytest.raises(ValueError, match=message):
        call(argument, *{make_gate: [()], register_gate: [Line]}.get(call, []))
