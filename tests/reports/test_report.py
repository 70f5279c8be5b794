import math
from collections import OrderedDict
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transfer_surgery import GatedActivation, PerLayer, get_activation, report
from transfer_surgery.reports import Report
from transfer_surgery.units import granularity_of, make_gate

ZERO, HALF, ONE = -9.0, 0.0, 9.0  # log_alpha of gates that predict 0, 0.5 and 1


def unit(
    log_alpha: list[float], source: str = "relu", granularity: str = "channel"
) -> GatedActivation:
    gate = make_gate("hard_concrete", (len(log_alpha),))
    gate.log_alpha.data = torch.tensor(log_alpha)
    return GatedActivation(
        get_activation(source),
        get_activation("sin"),
        gate,
        granularity=granularity_of(granularity),
        neurons=10 * len(log_alpha),
    )


def test_a_row_says_what_its_site_is_and_how_its_gates_stand():
    block = nn.Sequential(nn.Linear(4, 4), unit([ZERO, HALF, ONE, ONE]))
    (row,) = report(nn.Sequential(nn.Flatten(), block))
    assert asdict(row) == {
        "path": "1.1",
        "source": "relu",
        "target": "sin",
        "granularity": "channel",
        "gates": 4,
        "neurons": 40,
        "source_neurons": 30,
        "transferred": 0.25,
        "kept": 0.5,
        "mixed": 0.25,
        "mean_gate": 0.625,
        "mean_log_alpha": 2.25,
    }


def test_the_total_weights_sites_by_their_gates_and_names_what_they_share():
    total = report(nn.Sequential(unit([ZERO]), unit([ONE, ONE, HALF], source="gelu"))).total
    assert (total.transferred, total.kept, total.mixed) == (0.25, 0.5, 0.25)
    assert total.mean_gate == pytest.approx(0.625)
    assert total.mean_log_alpha == 2.25
    assert (total.gates, total.neurons) == (4, 40)
    assert (total.path, total.source, total.target) == ("total", "various", "sin")


@given(st.lists(st.lists(st.floats(-6, 6), min_size=1, max_size=60), min_size=1, max_size=4))
def test_shares_equal_counts_of_the_prediction_gates(locations):
    model = nn.Sequential(*[unit(values) for values in locations])
    result = report(model)
    everything = []
    for row, module in zip(result, model, strict=True):
        z = module.gate.predict().tolist()
        everything += z
        assert row.transferred == z.count(0.0) / len(z)
        assert row.kept == z.count(1.0) / len(z)
        assert row.mean_gate == pytest.approx(sum(z) / len(z), rel=1e-5)
    total = result.total
    assert total.transferred == everything.count(0.0) / len(everything)
    assert total.kept == everything.count(1.0) / len(everything)
    assert math.isclose(total.transferred + total.kept + total.mixed, 1)
    assert total.mean_gate == pytest.approx(sum(everything) / len(everything), rel=1e-5)


def test_gates_without_log_alpha_have_none_and_do_not_count_in_its_mean():
    line = GatedActivation(
        get_activation("relu"),
        get_activation("sin"),
        make_gate("line", (5,)),
        granularity=PerLayer(),
    )
    line.gate.progress.fill_(0.25)
    first, second = report(nn.Sequential(line, unit([3.0])))
    assert (first.mean_gate, first.mean_log_alpha) == (0.75, None)
    assert second.mean_log_alpha == 3
    assert report(nn.Sequential(line, unit([3.0]))).total.mean_log_alpha == 3
    assert report(line).total.mean_log_alpha is None


def test_a_report_changes_nothing():
    model = nn.Sequential(unit([HALF])).train()
    state = torch.get_rng_state()
    report(model)
    assert model.training
    assert model[0].log_alpha.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_total_is_none_of_the_rows_but_in_the_dict():
    result = report(nn.Sequential(unit([ONE]), unit([ZERO])))
    assert [row.path for row in result] == ["0", "1"]
    assert result.to_dict()["total"] == asdict(result.total)
    assert result.to_dict()["by"] == "site"


@pytest.mark.parametrize(
    ("zeros", "shown"), [(0, " 0 %"), (1, "<0.1 %"), (1000, "50.0 %"), (1999, ">99.9 %")]
)
def test_the_table_says_0_and_100_percent_of_exact_shares_only(zeros, shown):
    text = str(report(unit([ZERO] * zeros + [HALF] * (2000 - zeros))))
    assert shown in text
    assert "100 %" in text or zeros


def test_by_stage_sums_the_rows_below_each_child_of_a_model_of_no_zoo():
    body = nn.Sequential(unit([ZERO]), nn.Sequential(unit([HALF, ONE, ONE], source="gelu")))
    model = nn.Sequential(OrderedDict(stem=unit([ONE, ONE]), body=body))
    by_stage, by_site = report(model, by="stage"), report(model)
    assert [row.path for row in by_stage] == ["stem", "body"]
    assert asdict(by_stage.rows[1]) == asdict(report(body).total) | {"path": "body"}
    assert by_stage.total == by_site.total
    assert (by_stage.by, by_site.by) == ("stage", "site")
    assert repr(by_stage) == "Report(2 stages, 6 gates, 16.7 % transferred)"


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="by='block': expected one of 'site', 'stage'"):
        report(nn.Sequential(unit([ONE])), by="block")


def test_the_report_reads_all_sites_in_one_transfer(monkeypatch):
    model = nn.Sequential(*[unit([HALF, ONE]) for _ in range(20)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert isinstance(report(model), Report)
    assert not any(e.key == "aten::_local_scalar_dense" for e in profile.key_averages())
