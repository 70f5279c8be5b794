import io
import sys
from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from transfer_surgery import GatedActivation, History, PerChannel, get_activation, report
from transfer_surgery.matching import MatchReport, MatchRow
from transfer_surgery.reports import plot_history, plot_match, plot_report
from transfer_surgery.units import make_gate


def model_of(sites: int, name: str = "layer{}") -> nn.Module:
    relu, sin = get_activation("relu"), get_activation("sin")
    model = nn.Module()
    for i in range(sites):
        unit = GatedActivation(
            relu, sin, make_gate("hard_concrete", (4,)), granularity=PerChannel(1)
        )
        unit.log_alpha.data.copy_(torch.tensor([-9.0, 0.0, 9.0, 9.0]))
        model.add_module(name.format(i), unit)
    return model


def history_of(model: nn.Module, steps: int) -> History:
    history = History(model)
    for step in range(steps):
        history.record(10 * step, lr=1 / (1 + step))
    return history


def matched(sites: int) -> MatchReport:
    rows = [
        MatchRow(f"layer{i}", "relu", "sin", 1 - i / 10, 0.5 + i, {"0": i / 2}, 99)
        for i in range(sites)
    ]
    return MatchReport((*rows, MatchRow("last", "relu", "square", None, None, None, None)))


def shown_labels(ax) -> list:
    """The texts at the rows, as drawn."""
    ax.figure.savefig(io.BytesIO(), format="png", dpi=50)
    return [label for label in ax.get_yticklabels() if label.get_text()]


def overlaps(labels: list) -> bool:
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    return any(a.y1 > b.y0 + 1 for a, b in pairwise(boxes))


@pytest.mark.parametrize("sites", [1, 100])  # of 100, every second one has a label
def test_labels_neither_overlap_nor_leave_the_figure_at_any_number_of_sites(sites):
    model = model_of(sites, "a_backbone_with_a_very_long_name_stage{}_activation")
    plots = plot_report(report(model)), plot_history(history_of(model, 3))
    for ax in (*plots, plot_match(matched(sites))):
        labels = shown_labels(ax)
        assert not overlaps(labels)
        assert min(label.get_window_extent().x0 for label in labels) >= 0
        assert len(labels) >= min(sites, 40)


def test_report_bars_add_up_to_the_rows_and_end_with_the_total():
    ax = plot_report(report(model_of(3)))
    widths = {c.get_label(): [bar.get_width() for bar in c] for c in ax.containers}
    assert widths == {"kept": [50] * 4, "mixed": [25] * 4, "transferred": [25] * 4}
    assert shown_labels(ax)[-1].get_text() == "total"


def test_the_heat_map_shows_transferred_shares_with_the_first_site_on_top():
    model = model_of(2)
    model.layer1.log_alpha.data.fill_(9.0)
    axes = plot_history(history_of(model, 3))
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == [[25, 25, 25], [0, 0, 0]]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_strips_show_mean_gate_and_lr_over_the_same_steps():
    figure = plot_history(history_of(model_of(2), 3)).figure
    strips = {ax.get_ylabel(): ax.lines[0] for ax in figure.axes if ax.lines}
    assert strips["E[z]"].get_ydata().tolist() == [0.625] * 3
    assert strips["lr"].get_ydata().tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert strips["lr"].get_xdata().tolist() == [0, 10, 20]


def test_the_lr_strip_appears_only_where_lr_was_recorded():
    history = History(model_of(1))
    for values, strips in (({"loss": 1.0}, {"E[z]"}), ({"lr": 1.0}, {"E[z]", "lr"})):
        history.record(**values)
        axes = plot_history(history).figure.axes
        assert {ax.get_ylabel() for ax in axes if ax.lines} == strips


def test_columns_reach_half_way_to_the_neighbouring_steps():
    history = History(model_of(1))
    for step in (0, 10, 50):
        history.record(step)
    (mesh,) = plot_history(history).collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5, 5, 30, 70]


def test_given_axes_are_used():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    model = model_of(2)
    assert report(model).plot(left) is left
    assert history_of(model, 2).plot(right) is right
    assert left.containers
    assert right.collections


def test_nothing_recorded_says_what_to_do():
    with pytest.raises(ValueError, match=r"call history\.record"):
        plot_history(History(model_of(1)))


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[plots\]'"):
        plot_report(report(model_of(1)))


def test_matches_are_drawn_as_bars_of_three_measures():
    ax = matched(3).plot()
    bars = {ax.get_xlabel(): [bar.get_width() for bar in ax.patches] for ax in ax.figure.axes}
    assert bars["R2"] == pytest.approx([1, 0.9, 0.8])
    assert bars["periods"] == [0.5, 1.5, 2.5]
    assert bars["output error"] == [0, 0.5, 1]
    labels = [label.get_text() for label in shown_labels(ax)]
    assert labels == ["layer0", "layer1", "layer2", "last"]


def test_sites_of_a_stage_stand_together_under_its_name():
    model = model_of(4)
    for i, stage in enumerate(["stem", "body", "stem", "body"]):
        unit = model.get_submodule(f"layer{i}")
        unit.stage = stage
        unit.log_alpha.data.fill_(9.0 if i < 3 else -9.0)
    ax = plot_history(history_of(model, 2))
    assert [label.get_text() for label in shown_labels(ax)] == [
        *("layer0", "layer2", "layer1", "layer3"),
    ]
    assert ax.collections[0].get_array().tolist() == [[0, 0], [0, 0], [0, 0], [100, 100]]
    assert [line.get_ydata()[0] for line in ax.lines] == [1.5]
    (side,) = (other for other in ax.figure.axes if other.texts)
    assert [(text.get_text(), text.get_position()[1]) for text in side.texts] == [
        *(("stem", 0.5), ("body", 2.5)),
    ]


@pytest.mark.parametrize("name", ["stage{}", "only.layer{}"])
def test_stages_are_not_named_where_each_site_is_one_or_all_are_in_one(name):
    model = nn.ModuleDict({"only": model_of(3)}) if "." in name else model_of(3)
    ax = plot_history(history_of(model, 2))
    assert not ax.lines
    assert not any(other.texts for other in ax.figure.axes)
