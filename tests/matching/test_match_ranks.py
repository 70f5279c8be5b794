"""Matching under torch.distributed: ranks bring different batches, and all get the same numbers."""

from pathlib import Path

import pytest
import torch

from tests.helpers.rank_programs import in_turn, matched, network, on_ranks
from transfer_surgery import match_targets


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    good, bad = batches(), batches()
    bad[1] = bad[1][:, :2]  # a batch of rank 1 that the model does not take
    return on_ranks(in_turn, folder, {"good": (matched, good), "bad": (matched, bad)})


def batches() -> list[torch.Tensor]:
    """Three, of which the first rank gets two."""
    return list(torch.randn(480, 6, generator=torch.Generator().manual_seed(3)).split(160))


def test_two_ranks_find_what_one_process_finds_with_all_batches(found):
    model = network()
    report = match_targets(model, batches(), refit=True)
    ranks = [result["good"] for result in found]
    for name, value in model.state_dict().items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-3, atol=1e-4)
    assert ranks[0]["r2"] == pytest.approx([row.r2 for row in report], rel=1e-4)


def test_an_error_on_one_rank_is_one_on_all_and_changes_nothing(found):
    before = network().state_dict()
    messages = [result["bad"]["error"] for result in found]
    assert "another rank" in messages[0]
    assert "shapes" in messages[1]
    for result in found:
        after = result["bad"]["state"]
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
