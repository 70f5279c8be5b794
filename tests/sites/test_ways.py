"""Where a unit may take the place of an activation module, and where the call is edited instead."""

import functools
from collections import OrderedDict, deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X, assert_every_promise
from tests.helpers.same_run import assert_same_runs, converted
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


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.linear = nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return F.silu(self.act(self.linear(x)) - 0.1)


class Walker(nn.Module):
    """Its outputs depend on all parameters below it, and maybe on the number of modules."""

    def __init__(self, counts=False):
        super().__init__()
        self.act, self.inner, self.counts = nn.Tanh(), Inner(), counts

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)
        norm = sum(p.square().sum() for p in self.parameters())
        if self.counts:
            norm = norm / len(list(self.modules()))
        return self.act(self.inner(x)) * norm - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_walks_over_parameters_and_modules_does_not_see_the_gates(dtype):
    model = Walker().to(dtype)
    ways = {site.path: site.way for site in find_activations(model, X)}
    assert ways == {"inner.act": "child", "inner.silu_0": "edit", "act": "child"}
    assert_every_promise(model, X)
    assert len([name for name, _ in model.named_parameters() if "log_alpha" in name]) == 3


def test_a_forward_that_counts_modules_does_not_see_the_gates():
    model = Walker(counts=True)
    assert_same_runs(model, converted(model, X), X)


class CallsChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        for child in self.inner.children():
            x = child(x) + 0.1
        return self.inner(x)


def test_no_unit_is_put_among_children_that_others_walk_over():
    model = CallsChildren()
    plan = find_activations(model, X)
    assert "walks over" in plan["inner.silu_0"].reason
    assert_every_promise(model, X, copies=())


class SwitchesModes(Inner):
    def forward(self, x):
        self.train(self.training)
        return super().forward(x)


def test_a_forward_that_sets_its_training_flag_walks_over_nothing():
    assert {site.way for site in find_activations(SwitchesModes(), X)} == {"child", "edit"}
    assert not find_activations(SwitchesModes(), X).walkers


class ByMode(nn.Module):
    """What it does in training, `train`, is another thing than in evaluation."""

    def __init__(self, evaluate, train):
        super().__init__()
        self.narrow, self.wide, self.cubic = nn.Linear(4, 6), nn.Linear(4, 8), nn.Conv1d(3, 6, 1)
        self.evaluate, self.train_ = evaluate, train

    def forward(self, x):
        given = (self.train_ if self.training else self.evaluate)(self, x)
        y = F.relu(given[0], inplace=given[1])
        return y + given[0] if given[2] else y - 0.1


def narrow(model, x):
    return model.narrow(x), False, False


@pytest.mark.parametrize(
    ("evaluate", "train", "reason"),
    [
        (narrow, lambda model, x: (model.wide(x), False, False), "see 6 and 8 channels"),
        (
            lambda model, x: (model.cubic(x[:, :3, None]), False, False),
            lambda model, x: (model.narrow(x), False, False),
            "see 3 and 2 axes",
        ),
        (
            lambda model, x: (model.narrow(x), True, True),
            lambda model, x: (model.narrow(x), False, True),
            "in training it is no in-place call",
        ),
    ],
)
def test_a_call_that_one_unit_cannot_serve_in_both_modes_is_listed(evaluate, train, reason):
    (site,) = find_activations(ByMode(evaluate, train), X)
    assert reason in site.reason


def test_a_unit_works_in_place_only_where_both_modes_do():
    model = ByMode(
        lambda model, x: (model.narrow(x), True, False),
        lambda model, x: (model.narrow(x), False, True),
    )
    (site,) = find_activations(model, X)
    assert site.reason is None
    assert_same_runs(model, converted(model, X), X)


KINDS = (nn.ReLU, nn.GELU)


def is_relu(act):
    return isinstance(act, nn.ReLU)


class ByHelper(Inner):
    def asks(self):
        return is_relu(self.act)

    def forward(self, x):
        return self.act(self.linear(x)) * (0.5 if self.asks() else 0.25) - 0.1


class ByMatch(ByHelper):
    def asks(self):
        match self.act:
            case nn.ReLU():
                return True
        return False


class ByTable(ByHelper):
    def asks(self):
        return isinstance(self.act, KINDS)


class ByName(ByHelper):
    def asks(self):
        return type(self.act).__name__ in ("ReLU", "GELU")


class FromOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x) * (0.5 if isinstance(self.inner.act, nn.ReLU) else 0.25) - 0.1


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.path = "a path of its own"

    def forward(self, x):
        return F.relu(x)


class AsksForAttribute(Inner):
    def __init__(self):
        super().__init__()
        self.act = Named()

    def forward(self, x):
        return self.act(self.linear(x)) * len(self.act.path)


class CountsVariables(Inner):
    def forward(self, x):
        for _ in range(2):
            x = F.relu(self.linear(x)) + 0.1
        return x * len(locals())


@pytest.mark.parametrize(
    "cls", [ByHelper, ByMatch, ByTable, ByName, FromOutside, AsksForAttribute, CountsVariables]
)
def test_what_a_forward_asks_for_has_the_same_answer_after_conversion(cls):
    model = cls()
    assert {site.way for site in find_activations(model, X) if site.reason is None} != {"child"}
    assert_same_runs(model, converted(model, X), X)


class BuildsWithClasses(Inner):
    """It names the class of its activation, but asks for nothing."""

    def build(self):
        return nn.ReLU() if isinstance(self.linear, nn.ReLU) else None

    def forward(self, x):
        return super().forward(nn.functional.relu(x))


def test_a_class_that_no_forward_asks_for_is_replaced():
    assert find_activations(BuildsWithClasses(), X)["act"].way == "child"
