"""The report of matching: where a site is, what its gates were fitted to, where a fit is poor."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery import MatchWarning, convert, match_targets
from transfer_surgery.matching import MatchReport, MatchRow
from transfer_surgery.matching.match_report import warn_of_poor_fits


class TwoCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.layer(x))
        return self.layer(F.pad(F.gelu(y), (0, 3)))


def test_a_row_says_where_its_site_is_in_the_code():
    x = torch.randn(64, 6)
    found = match_targets(convert(TwoCalls(), example_input=x), [x])
    lines, first = inspect.getsourcelines(TwoCalls)
    at = {name: first + n for n, s in enumerate(lines) for name in ("relu", "gelu") if name in s}
    assert [row.where for row in found] == [
        f"test_match_report.py:{at[row.source]}" for row in found
    ]
    assert f"test_match_report.py:{at['gelu']}" in str(found)


@pytest.mark.parametrize("batch", [1024, 64])
def test_range_and_share_outside_of_it_are_those_of_parts_against_the_others(batch):
    torch.manual_seed(0)
    x = torch.randn(1024, 6) * torch.rand(1024, 1) ** -0.5
    layer = nn.Linear(6, 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 2))
    model = convert(model, example_input=x, granularity="channel")
    (row,) = match_targets(model, x.split(batch))
    values = layer(x).detach().numpy()
    assert row.range == pytest.approx((values.min(), values.max()))
    # One batch is divided; batches are taken in turn.
    blocks = np.split(values, 1024 // batch if batch == 64 else 8)
    parts = [np.concatenate(blocks[i::8]) for i in range(8)]
    outside = 0
    for i, part in enumerate(parts):
        others = np.concatenate(parts[:i] + parts[i + 1 :])
        outside += ((part < others.min(0)) | (part > others.max(0))).sum()
    assert row.outside == pytest.approx(outside / values.size)
    assert outside > 3


def test_a_few_values_say_that_new_ones_will_lie_elsewhere():
    x = torch.randn(2, 6)
    model = convert(nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)), example_input=x)
    with pytest.warns(MatchWarning, match="fewer than 30 values"):
        found = match_targets(model, [x])
    assert found.rows[0].outside == 1
    assert "will lie outside of the fitted range at 1 (container.py:" in str(found)
    assert "outside of" not in str(match_targets(model, [torch.randn(4096, 6)]))


def test_a_poor_fit_is_warned_of():
    rows = (
        MatchRow(f"{i}", "relu", "sin", r2, 0.5, {"output": 0.1}, 99, where=f"net.py:{i}")
        for i, r2 in enumerate((0.4, 0.6))
    )
    with pytest.warns(MatchWarning, match=r"less than 50% .* at 0 \(net.py:0\): .*exclude="):
        warn_of_poor_fits(MatchReport(tuple(rows)))
