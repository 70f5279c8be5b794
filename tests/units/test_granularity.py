import copy
import json

import pytest
import torch
from torch import nn

from transfer_surgery import PerChannel, PerLayer, PerNeuron, convert, load_gates, save_gates
from transfer_surgery.units import granularity_of

SHAPE = (2, 3, 4, 5)
# What has a gate of its own, as a function of an element's index.
GATE_OF = {
    PerLayer(): lambda i: (0,),
    PerChannel(1): lambda i: (i[1],),
    PerChannel(-1): lambda i: (i[3],),
    PerChannel(2): lambda i: (i[2],),
    PerNeuron(): lambda i: i[1:],
}


@pytest.mark.parametrize("granularity", GATE_OF, ids=repr)
@pytest.mark.parametrize("per_example", [False, True])
def test_each_element_sees_the_value_of_its_gate(granularity, per_example):
    x = torch.zeros(SHAPE)
    shape = granularity.gate_shape(SHAPE)
    values = torch.randn((2, *shape) if per_example else shape)
    seen = granularity.expand(values, x).expand_as(x)
    for index in torch.ones(SHAPE).nonzero().tolist():
        own = (index[0],) if per_example else ()
        assert seen[tuple(index)] == values[own + tuple(GATE_OF[granularity](index))]


@pytest.mark.parametrize("granularity", GATE_OF, ids=repr)
def test_groups_hold_the_elements_that_share_a_gate_in_the_order_of_the_gates(granularity):
    x = torch.randn(SHAPE)
    groups = granularity.group(x)
    assert len(groups) == torch.ones(granularity.gate_shape(SHAPE)).sum()
    expected = {}
    for index in torch.ones(SHAPE).nonzero().tolist():
        gate = tuple(GATE_OF[granularity](index))
        expected.setdefault(gate, []).append(x[tuple(index)].item())
    for group, gate in zip(groups, sorted(expected), strict=True):
        assert sorted(group.tolist()) == sorted(expected[gate])


@pytest.mark.parametrize("granularity", GATE_OF, ids=repr)
def test_granularities_turn_to_json_and_back(granularity):
    assert granularity_of(json.loads(json.dumps(granularity.to_dict()))) == granularity


@pytest.mark.parametrize("given", ["pixel", {"name": "pixel"}, {}])
def test_an_unknown_granularity_is_answered_with_the_known_ones(given):
    with pytest.raises(ValueError, match=r"unknown granularity .*layer, channel, neuron.*PerLayer"):
        granularity_of(given)


def test_an_axis_that_is_given_overrides_the_one_that_was_found():
    x = torch.zeros(2, 3, 4, 5)
    model = convert(
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.GELU()),
        granularity={"1": PerChannel(-1), "*": "channel"},
        example_input=x,
    )
    assert [unit.gate.shape for unit in (model[1], model[2])] == [(5,), (6,)]
    assert [unit.granularity for unit in (model[1], model[2])] == [PerChannel(-1), PerChannel(1)]


def test_gates_along_an_axis_that_was_given_come_back_into_the_base_model(tmp_path):
    base, x = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()), torch.zeros(2, 3, 4, 5)
    model = convert(copy.deepcopy(base), granularity=PerChannel(-1), example_input=x)
    save_gates(model, tmp_path / "gates.safetensors")
    for again in (base, convert(copy.deepcopy(base), granularity=PerChannel(-1), example_input=x)):
        load_gates(again, tmp_path / "gates.safetensors", example_input=x)
        assert again[1].granularity == PerChannel(-1)
        assert torch.equal(again[1].log_alpha, model[1].log_alpha)


@pytest.mark.parametrize("axis", [0, 4, -4, -5])
def test_an_axis_that_the_input_does_not_have_is_refused(axis):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())
    with pytest.raises(ValueError, match=rf"1: its input .* no axis for PerChannel\(axis={axis}\)"):
        convert(model, granularity=PerChannel(axis), example_input=torch.zeros(2, 3, 4, 5))
    assert type(model[1]) is nn.ReLU


@pytest.mark.parametrize("short", ["channel", "neuron"])
def test_short_forms_mean_one_gate_where_the_input_has_no_axis_for_more(short):
    model = convert(nn.Sequential(nn.ReLU()), granularity=short, example_input=torch.zeros(5))
    assert model[0].granularity == PerLayer()
    assert model(torch.randn(7)).shape == (7,)
