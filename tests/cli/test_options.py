"""Options of several commands, and the weights that they load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery.cli.options import model_spec
from transfer_surgery.cli.weights import read_weights


def test_yes_and_no_reach_the_model_also_in_small_letters() -> None:
    given = ["bias=false", "norm=true", "act=relu", "name='true'", "width=2"]
    expected = {"bias": False, "norm": True, "act": "relu", "name": "true", "width": 2}
    assert model_spec("net", given, None).arguments == expected


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_model_may_call_a_part_of_it_module(prefix: str, tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)

    state = Wrapper().state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pth")
    assert_same_bits(read_weights(tmp_path / "weights.pth", state), state)
