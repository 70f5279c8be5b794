"""The benchmark of matching measures what it says."""

import sys

import pytest
import torch
from match_speed import _measure


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("refit", [False, True])
def test_match_speed_measures_a_model(refit):
    found = _measure("test_resnet", 32, 96, refit, torch.get_num_threads())
    assert found["sites"] == 12
    assert found["seconds"] > found["forward"] > 0
    assert found["largest_mib"] == 96 * 32 * 16 * 16 * 4 / 2**20
