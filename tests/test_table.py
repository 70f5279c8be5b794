"""What all reports have in common: rows as text, HTML, a dict, JSON, a data frame."""

import json
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass

import pytest
import torch
from torch import nn

from transfer_surgery import (
    bake,
    convert,
    find_activations,
    fold_targets,
    match_targets,
    report,
    sensitivity,
    swap_targets,
)
from transfer_surgery._table import Column, Table


@dataclass(frozen=True)
class Animal:
    name: str
    legs: int | None
    weight: float


class Animals(Table[Animal]):
    columns = (
        Column("name"),
        Column("legs", "number of legs"),
        Column("weight", text=lambda weight: f"{weight:.0f} kg"),
    )


ZOO = Animals((Animal("<cat>", 4, 3.6), Animal("snake", None, 12.0)))


@pytest.fixture(scope="module")
def every_report() -> list[Table]:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), example_input=x)
    found = [report(model), match_targets(model, [x]), sensitivity(model, [x])]
    return [*found, fold_targets(bake(swap_targets(model)), x)]


def test_words_stand_left_and_numbers_right_under_one_heading():
    assert str(ZOO).splitlines() == [
        "name   number of legs  weight",
        "-----------------------------",
        "<cat>               4    4 kg",
        "snake               -   12 kg",
    ]


def test_a_total_is_set_off_and_notes_stand_below():
    class WithTotal(Animals):
        def total_row(self):
            return Animal("all", 4, 15.6)

        @property
        def notes(self):
            return ("Two of them.",)

    lines = str(WithTotal(ZOO.rows)).splitlines()
    assert lines[:-3] == str(ZOO).splitlines()
    assert lines[-3:] == [lines[1], "all                 4   16 kg", "Two of them."]


def test_a_table_without_rows_has_its_headings():
    assert str(Animals(())).splitlines()[0] == "name  number of legs  weight"


def test_html_shows_the_same_cells_and_escapes_them():
    html = ZOO._repr_html_()
    assert html.startswith("<table><tr><th>name</th><th>number of legs</th><th>weight</th></tr>")
    assert "<tr><td>&lt;cat&gt;</td><td>4</td><td>4 kg</td></tr>" in html


def test_every_report_is_a_table(every_report):
    for table in every_report:
        assert tuple(table) == table.rows
        assert len(table) == len(table.rows) > 0
        assert len(str(table).splitlines()) >= 2 + len(table)
        assert table._repr_html_().count("<tr>") >= 1 + len(table)
        assert table.to_dict()["version"] == 1
        assert table.to_dict()["rows"] == json.loads(json.dumps([asdict(row) for row in table]))
        assert json.loads(table.to_json()) == table.to_dict()
        frame = table.to_pandas()
        assert frame["path"].tolist() == [row.path for row in table]
        assert list(frame.columns) == list(asdict(table.rows[0]))
        assert "\n" not in repr(table)
        with pytest.raises(FrozenInstanceError):
            table.rows = ()
        with pytest.raises(FrozenInstanceError):
            table.rows[0].path = ""


def test_json_has_null_for_what_is_not_finite():
    table = Animals((Animal("ghost", None, float("nan")), Animal("whale", 0, float("inf"))))
    assert [row["weight"] for row in json.loads(table.to_json())["rows"]] == [None, None]


def test_a_plan_is_a_table_of_plain_values():
    plan = find_activations(nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(0.5)), torch.zeros(1, 3))
    assert str(plan).splitlines()[0].split()[:3] == ["path", "activation", "kind"]
    assert "leaky_relu(negative_slope=0.5)" in plan._repr_html_()
    (row,) = json.loads(plan.to_json())["rows"]
    assert row["source"] == "leaky_relu(negative_slope=0.5)"
    assert row["shape"][1:] == [2]
    assert row["module_type"].endswith("LeakyReLU")
    assert plan.to_pandas()["path"].tolist() == ["1"]


def test_without_pandas_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        ZOO.to_pandas()
