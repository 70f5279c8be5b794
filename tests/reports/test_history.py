import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

from transfer_surgery import GatedActivation, History, PerChannel, get_activation
from transfer_surgery.units import make_gate


def model_of(*shapes: int) -> nn.Sequential:
    relu, sin = get_activation("relu"), get_activation("sin")
    gates = [make_gate("hard_concrete", (n,)) for n in shapes]
    return nn.Sequential(*[GatedActivation(relu, sin, g, granularity=PerChannel(1)) for g in gates])


def put(model: nn.Sequential, *locations: float) -> None:
    """Move all gates of each site to a location."""
    for unit, location in zip(model, locations, strict=True):
        unit.log_alpha.data.fill_(location)


@pytest.fixture
def history() -> History:
    """Two sites with 1 and 3 gates; the first, then both are transferred."""
    model = model_of(1, 3)
    history = History(model)
    for step, locations in ((0, (9, 9)), (10, (-9, 0)), (20, (-9, -9))):
        put(model, *locations)
        history.record(step, lr=0.1 / (1 + step))
    return history


def test_each_record_holds_every_site_and_the_total(history):
    assert [r.step for r in history.records] == [0, 10, 20]
    reports = [record.report for record in history.records]
    assert [[row.transferred for row in r] for r in reports] == [[0, 0], [1, 0], [1, 1]]
    assert [[row.mean_gate for row in r] for r in reports] == [[1, 1], [0, 0.5], [0, 0]]
    assert [r.total.transferred for r in reports] == [0, 0.25, 1]
    assert [r.total.mean_gate for r in reports] == [1, 0.375, 0]


def test_steps_count_from_zero_and_go_on_from_the_last():
    history = History(model_of(1))
    for step in (None, None, 10, None, None):
        history.record(step)
    assert [r.step for r in history.records] == [0, 1, 10, 11, 12]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate/total": 1.0}, "^gate/total: names"),
        ({"loss": None}, r"^loss=None is not one number"),
        ({"loss": torch.ones(2)}, r"^loss=tensor\(.* is not one number"),
    ],
)
def test_values_that_a_record_cannot_hold_are_named_before_it_is_made(values, message):
    history = History(model_of(1))
    with pytest.raises(ValueError, match=message):
        history.record(**values)
    assert len(history) == 0


@pytest.mark.parametrize("step", [7, 3, float("nan")])
def test_steps_must_increase(step):
    history = History(model_of(1))
    history.record(7)
    with pytest.raises(ValueError, match="steps must increase"):
        history.record(step)
    assert len(history) == 1


def test_values_are_aligned_with_steps_also_where_some_are_left_out():
    history = History(model_of(1))
    history.record(lr=0.1)
    history.record(lr=0.2, loss=torch.tensor(0.5, requires_grad=True))
    history.record()
    assert history.value_names() == ("lr", "loss")
    assert history.value("lr") == [0.1, 0.2, None]
    assert history.value("loss") == [None, 0.5, None]


def test_flat_is_the_latest_record_as_floats(history):
    history.model[1].log_alpha.data.copy_(torch.tensor([-9.0, 9.0, 9.0]))
    assert history.record().total.transferred == 0.5
    flat = history.flat()
    assert flat == pytest.approx(
        {
            "transfer/total": 0.5,
            "gate/total": 0.5,
            "transfer/0": 1.0,
            "gate/0": 0.0,
            "transfer/1": 1 / 3,
            "gate/1": 2 / 3,
        }
    )
    assert type(flat) is dict  # what loggers take: names and plain numbers
    assert all(type(value) is float for value in flat.values())


def test_json_holds_the_dict_and_its_version(history):
    stored = history.to_dict()
    assert json.loads(history.to_json()) == stored
    assert stored["version"] == 1
    assert stored["steps"] == [0, 10, 20]
    assert stored["sites"][1] == {
        **{"path": "1", "stage": "1"},
        **{"transferred": [0, 0, 1], "mean_gate": [1, 0.5, 0]},
    }
    assert stored["total"]["transferred"] == [0, 0.25, 1]
    assert stored["values"]["lr"] == history.value("lr")
    history.record(30, loss=math.inf)
    assert json.loads(history.to_json(), parse_constant=pytest.fail)["values"]["loss"][-1] is None


def test_pandas_has_a_line_per_step(history):
    frame = history.to_pandas()
    assert frame["step"].tolist() == [0, 10, 20]
    assert frame["transfer/1"].tolist() == [0, 0, 1]
    assert frame["lr"].tolist() == history.value("lr")


def test_an_empty_history_exports_and_flat_says_what_to_do():
    history = History(model_of(1))
    assert history.to_dict()["steps"] == []
    with pytest.raises(ValueError, match=r"call history\.record"):
        history.flat()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_a_copy_leaves_the_model_behind_and_goes_on_with_one(history, clone):
    model = history.model
    other = clone(history)
    assert other.model is None
    assert other.to_dict() == history.to_dict()
    with pytest.raises(RuntimeError, match=r"set history\.model"):
        other.record()
    other.model = model
    other.record()
    assert (len(other), len(history)) == (4, 3)
    assert history.model is model


def test_a_model_whose_sites_changed_is_refused(history):
    del history.model[1]
    with pytest.raises(ValueError, match=r"1 sites, before 2"):
        history.record()
    assert len(history) == 3
