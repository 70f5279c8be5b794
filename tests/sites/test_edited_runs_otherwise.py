"""An edited forward that runs otherwise than at the conversion says so, and runs as written."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X
from tests.helpers.ways_to_call import Function, Parts, Settings, Steps, helper
from tests.helpers.ways_to_choose import Choice
from transfer_surgery import convert, revert
from transfer_surgery.units import gated_activations


def late(x):
    return F.gelu(x)


class Varying(Parts):
    def forward(self, x, functions):
        for function in functions:
            x = function(self.linear(x))
        return x


def test_more_calls_of_a_place_than_at_the_conversion_keep_the_activation_with_a_warning():
    model = convert(Steps().eval(), example_input=X)
    model.layers.append(nn.Linear(4, 4))
    with pytest.warns(RuntimeWarning, match=r"Steps calls relu .* more often than when"):
        after = model(X)
    assert torch.equal(after, revert(model)(X))


def test_another_function_in_the_place_of_an_edited_one_runs_with_a_warning():
    model = convert(Function().eval(), example_input=X)
    model.written = lambda h: h * 2
    with pytest.warns(RuntimeWarning, match="is called where another function was"):
        after = model(X)
    assert torch.equal(after, revert(model)(X))


def test_a_setting_that_changes_is_followed_with_a_warning():
    model = convert(Settings().eval(), example_input=X)
    model.slope = 0.5
    with pytest.warns(RuntimeWarning, match="leaky_relu .* with other settings than when"):
        after = model(X)
    assert torch.equal(after, revert(model)(X))


class Written(Parts):
    """A swish by hand whose slope rises, as written in four ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.slope = how, 1

    def forward(self, x):
        h = self.linear(x)
        if self.how == "expression":
            return h * torch.sigmoid(h * (2 * self.slope))
        if self.how == "in place":
            h *= torch.sigmoid(self.slope * h)
            return h
        if self.how == "several statements":
            gate = torch.sigmoid(self.slope * h)
            return h * gate
        parts = [part * torch.sigmoid(self.slope * part) for part in (h, 2 * h)]
        return self.linear(sum(parts))


@pytest.mark.parametrize("how", ["expression", "in place", "several statements", "loop"])
def test_a_number_in_a_formula_that_changes_is_followed_with_a_warning(how):
    original = Written(how).eval()
    model = convert(copy.deepcopy(original), example_input=X)
    for slope in (1, 3):
        model.slope = original.slope = slope
        with pytest.warns(RuntimeWarning) if slope == 3 else contextlib.nullcontext() as found:
            after = model(X)
        assert found is None or "Written calls" in str(found[0].message)
        assert torch.equal(torch.stack([*after]), torch.stack([*original(X)]))


def test_another_activation_in_the_place_of_one_runs_with_a_warning():
    model = convert(Choice().eval(), example_input=X)
    model.other = True
    with pytest.warns(RuntimeWarning, match="Choice calls relu"):
        after = model(X)
    assert torch.equal(after, revert(model)(X))


class Branches(Parts):
    """A module and a method of its own that have the names of a tensor's methods."""

    def __init__(self):
        super().__init__()
        self.tanh, self.block = nn.Linear(4, 4), nn.ModuleDict({"relu": nn.Linear(4, 4)})

    def forward(self, x, other=False):
        x = F.relu(self.linear(x)) - 0.1
        return self.block.relu(self.tanh(x)) if other else x


def test_no_warning_of_modules_that_only_have_the_name_of_an_activation():
    model = convert(Branches().eval(), example_input=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X, other=True)


def test_another_function_with_an_activation_among_several_is_warned_of():
    model = convert(Varying().eval(), example_input=(X, [helper, torch.neg]))
    with pytest.warns(RuntimeWarning, match="late is called where another function was"):
        model(X, [helper, late])


class Bounds(Parts):
    """Clamps in one place, of which the one at 0 is a ReLU; a threshold has settings as well."""

    low, high = 0.1, 0.5

    def forward(self, x, lows=(0.0, 1e-6)):
        x = self.linear(x)
        for low in lows:
            x = torch.clamp(x, min=low)
        return F.threshold(x, threshold=self.low, value=self.high) - 0.1


@pytest.mark.parametrize("lows", [(0.0, 1e-6), (0.0, torch.tensor([0.1, 0.2, 0.3, 0.4]))])
def test_settings_that_make_no_activation_run_as_written_without_a_warning(lows):
    original = Bounds().eval()
    wanted = original(X, lows)
    model = convert(original, example_input=X)
    sources = [unit.source.name for _, unit in gated_activations(model)]
    assert sources == ["relu", "threshold"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(X, lows), wanted)


class OwnTensor(torch.Tensor):
    def relu(self):
        return torch.Tensor.relu(self) + 1

    def own(self):
        return self * 2


class Methods(Parts):
    def forward(self, x, kind=torch.Tensor, name="relu"):
        function = getattr(self.linear(x).as_subclass(kind), name)
        return function() - 0.1


@pytest.mark.parametrize("name", ["relu", "own"])
@pytest.mark.filterwarnings("ignore:OwnTensor.relu is called where another function was")
def test_a_method_of_a_subclass_of_tensor_is_its_own(name):
    original = Methods().eval()
    wanted = original(X, OwnTensor, name)
    model = convert(original, example_input=X)
    assert torch.equal(model(X, OwnTensor, name), wanted)
    assert model(X).grad_fn is not None
