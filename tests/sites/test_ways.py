"""Where a unit may take the place of an activation module, and where the call is edited instead."""

import functools
from collections import OrderedDict, deque, namedtuple
from types import SimpleNamespace

import pytest
from torch import nn

from tests.helpers.promises import X, assert_every_promise
from transfer_surgery import find_activations

Held = namedtuple("Held", "act")


class Holder(nn.Module):
    """It keeps its activation module a second time, and calls that."""

    def __init__(self, hold, take):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()
        self.held, self.take = hold(self.act), take

    def forward(self, x):
        act = self.take(self.held)
        return act(self.linear(x)) - 0.1


def closure(act):
    return lambda x: act(x)


HELD = {
    "ordered dict": (lambda act: OrderedDict(act=act), lambda held: held["act"]),
    "named tuple": (Held, lambda held: held.act),
    "namespace": (lambda act: SimpleNamespace(act=act), lambda held: held.act),
    "deque": (lambda act: deque([act]), lambda held: held[0]),
    "partial": (functools.partial, lambda held: held),
    "method": (lambda act: act.__call__, lambda held: held),
    "closure": (closure, lambda held: held),
    "key": (lambda act: {act: 1}, lambda held: next(iter(held))),
}


@pytest.mark.parametrize("held", HELD)
def test_a_module_that_is_called_where_no_unit_can_be_stays_and_the_call_is_edited(held):
    model = Holder(*HELD[held])
    (site,) = find_activations(model, X)
    assert site.way in ("edit", "intercept")
    assert_every_promise(model, X, copies=())


@pytest.mark.parametrize(
    ("hold", "take"),
    [
        (lambda act: {"act": act}, lambda held: held["act"]),
        (lambda act: [{"act": (act,)}], lambda held: held[0]["act"][0]),
    ],
)
def test_a_unit_takes_the_place_of_a_module_also_in_attributes(hold, take):
    model = Holder(hold, take)
    assert find_activations(model, X)["act"].way == "child"
    assert_every_promise(model, X, copies=())


class ByModule(nn.Module):
    """What it does with a module is in a dictionary whose keys are modules."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()
        self.scales = {self.act: 0.5}

    def forward(self, x):
        return self.act(self.linear(x)) * self.scales[self.act] - 0.1


def test_a_module_that_is_a_key_stays():
    model = ByModule()
    assert find_activations(model, X)["act_0"].way == "edit"
    assert_every_promise(model, X, copies=())


def test_a_module_in_a_container_that_is_not_registered_is_listed():
    model = Holder(lambda act: [nn.Sequential(act)], lambda held: held[0])
    (site,) = find_activations(model, X)
    assert "not registered" in site.reason
