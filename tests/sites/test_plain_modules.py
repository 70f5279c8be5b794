"""Modules that are an activation are replaced; those that do something else too go on doing it."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import find_activations

X = torch.linspace(-3, 3, 12).reshape(3, 4)


class Around(nn.Module):
    """Two layers with an activation module between them, which may be called with more."""

    def __init__(self, act, *more):
        super().__init__()
        self.first, self.second, self.act, self.more = nn.Linear(4, 4), nn.Linear(4, 4), act, more

    def forward(self, x):
        x = self.act(self.first(x), *self.more)
        return self.second(x) * len(getattr(self.act, "log", "-")) + self.first(x)


class Logging(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, []


class Counts(Logging):
    def forward(self, x):
        self.calls += 1
        return F.relu(x)


class Logs(Logging):
    def forward(self, x):
        self.log.append(float(x.detach().sum()))
        return F.relu(x)


class CountsBelow(nn.ReLU):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class CountsInMethod(Logging):
    def note(self, x):
        self.calls += 1
        return F.silu(x)

    def forward(self, x):
        return self.note(x)


class Draws(nn.Module):
    def forward(self, x):
        random.random()
        return F.gelu(x)


class ByMode(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else F.gelu(x)


class InTrainingOnly(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else x


class WithoutGradient(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return F.relu(x)


class OnPurpose(nn.Module):
    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 3)
        return F.relu(x)


class ByArgument(nn.Module):
    def forward(self, x, kind="relu"):
        return F.relu(x) if kind == "relu" else F.gelu(x)


class ByValue(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else F.relu(x) * 2


class Property(Logging):
    @property
    def slope(self):
        self.calls += 1
        return 0.2

    def forward(self, x):
        return F.leaky_relu(x, self.slope)


def quietly(function):
    def wrapper(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args)

    return wrapper


class Decorated(nn.Module):
    @quietly
    def forward(self, x):
        return F.relu(x)


class CallsOverridden(Logging):
    def __call__(self, x):
        self.calls += 1
        return super().__call__(x)

    def forward(self, x):
        return F.relu(x)


def again(x, deeper=True):
    return again(x, deeper=False) if deeper else F.silu(x)


class CallsItself(nn.Module):
    def forward(self, x):
        return again(x)


def with_a_name_without_a_value():
    if X.isnan().any():
        missing = F.gelu

    class Later(nn.Module):
        slow = False

        def forward(self, x):
            return missing(x) if self.slow else F.relu(x)

    return Later()


@pytest.mark.parametrize("made", [CallsItself, with_a_name_without_a_value])
def test_code_that_cannot_be_read_to_its_end_runs_as_before(made):
    model = Around(made())
    (site,) = find_activations(model, X)
    assert site.way != "child"
    assert_same_runs(model, converted(model, X), X)


EFFECTS = (Counts, Logs, CountsBelow, CountsInMethod, Draws, ByMode, InTrainingOnly)
EFFECTS += (WithoutGradient, OnPurpose, ByValue, Property, Decorated, CallsOverridden)


@pytest.mark.parametrize("cls", EFFECTS, ids=lambda cls: cls.__name__)
def test_a_module_that_does_more_than_an_activation_goes_on_doing_it(cls):
    model = Around(cls())
    plan = find_activations(model, X)
    assert plan.rows
    assert {site.way for site in plan} <= {"edit", "intercept"}, plan
    assert_same_runs(model, converted(model, X), X)


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_what_else_a_module_is_given_chooses_its_activation_as_before(kind):
    model = Around(ByArgument(), kind)
    (site,) = find_activations(model, X)
    assert (site.path, site.way) == (f"act.{kind}_0", "edit")
    assert_same_runs(model, converted(model, X), X)


def twice(x, factor=1.0):
    return x * torch.sigmoid(factor * x)


class Formula(nn.Module):
    def forward(self, input):
        positive = F.relu(input)
        return torch.square(positive)


class Function(nn.Module):
    factor = 1.702

    def forward(self, x):
        """As users write it."""
        return twice(x, self.factor)


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = self.own

    def own(self, x):
        return 0.5 * x * (1.0 + torch.erf(x / 2**0.5))

    def forward(self, x):
        return self.function(x)


class Partial(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.gelu, approximate="tanh")

    def forward(self, x):
        return self.function(x)


class Branches(nn.Module):
    inplace = False

    def forward(self, x):
        if self.inplace:
            return x.sigmoid_()
        return x.sigmoid()


class Below(nn.SiLU):
    pass


@pytest.mark.parametrize("cls", [Formula, Function, Attribute, Partial, Branches, Below])
def test_a_module_that_is_an_activation_is_replaced(cls):
    (site,) = find_activations(nn.Sequential(nn.Linear(4, 4), cls(), nn.Linear(4, 2)), X)
    assert (site.path, site.way) == ("1", "child")
