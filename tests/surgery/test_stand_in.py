"""A unit answers for the module it stands for: its call, attributes, hooks, and what it saves."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.helpers.promises import X, assert_every_promise, units
from transfer_surgery import bake, convert, revert


class Slope(nn.LeakyReLU):
    @property
    def angle(self):
        return self.negative_slope / 2

    @property
    def broken(self):
        raise RuntimeError("this model has not been trained yet")

    def twice(self):
        return 2 * self.negative_slope


class Asking(nn.Module):
    """Calls its activation by keyword and asks it for what it has."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), Slope(0.2)

    def forward(self, x):
        asked = self.act.negative_slope + self.act.angle + self.act.twice()
        return self.act(input=self.linear(x)) * (1 + asked)


def test_a_unit_is_called_and_asked_as_the_module_was_also_when_baked():
    assert_every_promise(Asking(), X)


class Annealed(nn.Module):
    """Sets its activation anew in each forward, as schedules of slopes do."""

    def __init__(self, shared):
        super().__init__()
        self.linear, self.act, self.shared, self.ran = nn.Linear(4, 4), Slope(0.1), shared, 0

    def forward(self, x):
        self.ran += 1
        self.act.negative_slope = 0.1 * self.ran
        x = self.act(self.linear(x))
        return self.act(self.linear(x)) if self.shared else x


@pytest.mark.parametrize("shared", [False, True], ids=["child", "edited"])
def test_a_module_that_is_set_anew_after_the_conversion_runs_as_it_is_set(shared):
    model = Annealed(shared).eval()
    original = copy.deepcopy(model)
    convert(model, example_input=X)
    assert torch.equal(model(X), original(X))
    with pytest.warns(RuntimeWarning, match="negative_slope is not what it was.*without gates"):
        assert torch.equal(model(X), original(X))
    copied = copy.deepcopy(model)
    with pytest.warns(RuntimeWarning, match="negative_slope"):
        assert torch.equal(copied(X), original(X))
    revert(model)
    assert model.act.negative_slope == 0.2
    original.ran = 2
    assert torch.equal(model(X), original(X))


def test_a_setting_is_followed_wherever_it_is_written_and_back_again():
    unit, module = nn.Sequential(Slope(0.1)), Slope(0.1)
    original = unit[0]
    hooked = []
    convert(unit, example_input=X)
    unit[0].register_forward_hook(lambda *_: hooked.append(1))
    for change in (
        lambda act, same: setattr(act, "negative_slope", 0.5),
        lambda act, same: setattr(act, "negative_slope", 0.1),
        lambda act, same: setattr(same, "negative_slope", 0.3),  # the object that the user has kept
        lambda act, same: setattr(act, "index", 7),  # nothing that the module computes with
    ):
        change(unit[0], original)
        change(module, module)
        with warnings.catch_warnings(action="ignore"):
            assert torch.equal(unit(X), module(X))
        assert unit[0].negative_slope == original.negative_slope == module.negative_slope
    assert len(hooked) == 4


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        h = self.linear(x)
        y = self.act(h)
        h.mul_(2)
        return y + h


@pytest.mark.parametrize("where", [8.0, 0.3, -8.0])
def test_a_network_that_writes_to_the_input_later_trains_wherever_the_gates_are(where):
    model = convert(Writing(), example_input=X)
    model.act.log_alpha.data.fill_(where)
    model(X).sum().backward()
    assert model.linear.weight.grad.isfinite().all()


def shared():
    act = nn.SiLU()
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), act) for _ in range(3))).eval()


def test_units_of_one_shared_module_have_hooks_of_their_own():
    model, fired = convert(shared(), example_input=X), []
    model[1][1].register_forward_hook(lambda *_: fired.append(1))
    model(X)
    assert fired == [1]
    for unit in units(model).values():
        unit.log_alpha.data.fill_(8.0)
    bake(model)(X)
    assert fired == [1, 1]


def test_hooks_of_a_shared_module_run_at_each_of_its_places():
    model, fired = shared(), []
    model[0][1].register_forward_hook(lambda *_: fired.append(1))
    convert(model, example_input=X)(X)
    assert len(fired) == 3


def test_gates_are_read_through_the_call_of_the_module_that_has_them():
    model, seen = convert(Writing(), example_input=X), []
    model.act.add_fitted_target()
    for module in (model.act.gate, model.act.fitted):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    model.act.log_alpha.data.fill_(-8.0)
    model.eval()(X)
    assert seen == ["HardConcreteGate", "TargetParameters"]
