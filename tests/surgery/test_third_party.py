"""Networks of foreign shape: containers, modules with a will of their own, computed weights."""

import copy
import functools
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.helpers.promises import Body, X, assert_every_promise, units
from transfer_surgery import convert, find_activations, revert

# Containers


class Iterating(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class Functional(nn.Sequential):
    """Iterates over itself and has activations of its own."""

    def forward(self, x):
        for module in self:
            x = F.gelu(module(x)) - 0.1
        return x


class Branching(Functional):
    """The same, with a branch that depends on values."""

    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


CHILDREN = {
    "children": lambda module: module.children(),
    "named_children": lambda module: (child for _, child in module.named_children()),
    "_modules": lambda module: module._modules.values(),
}


class Children(nn.Module):
    """Walks over its children in each of the ways that nn.Module offers, activation and all."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.act, self.second = how, nn.Linear(4, 4), nn.ReLU(), nn.Tanh()

    def forward(self, x):
        for child in CHILDREN[self.how](self):
            x = F.silu(child(x)) - 0.1
        return x


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Linear(4, 4), act]),
                nn.ModuleDict({"linear": nn.Linear(4, 4), "act": act}),
            ]
        )

    def forward(self, x):
        for module in self.blocks[0]:
            x = module(x)
        for module in self.blocks[1].values():
            x = module(x)
        return x


class PlainList(nn.Module):
    """Registers its modules and calls them from a list, as much code before ModuleList does."""

    def __init__(self):
        super().__init__()
        self.steps, self.table = [nn.Linear(4, 4), nn.ReLU()], {}
        for number, step in enumerate(self.steps):
            self.add_module(f"step{number}", step)
        self.table["last"] = (self.step0, nn.Tanh())
        self.last = self.table["last"][1]

    def forward(self, x):
        for step in (*self.steps, *self.table["last"]):
            x = step(x)
        return x


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = [nn.Tanh(), nn.SiLU()]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_one_activation_under_several_names_is_replaced_under_each_of_them():
    act = nn.ReLU()
    for cls in (nn.Sequential, Iterating):
        model = cls(nn.Linear(4, 4), act, nn.Linear(4, 3), act)
        assert_every_promise(model, X)
        assert list(units(model)) == ["1", "3"]
        assert len(model) == 4  # units are no further steps of the loop
        revert(model)
        assert model[1] is model[3] is act


@pytest.mark.parametrize(
    ("model", "number"),
    [
        (Functional(nn.Linear(4, 4), nn.Linear(4, 3)), 2),
        (Branching(nn.Linear(4, 4), nn.Linear(4, 3)), 2),
        *((Children(how), 5) for how in CHILDREN),
        (Nested(), 2),
    ],
    ids=lambda one: type(one).__name__,
)
def test_units_are_no_steps_of_a_container_that_is_converted(model, number):
    assert len(units(assert_every_promise(model, X))) == number


def test_registered_activations_that_are_called_from_a_plain_list_or_dict_are_converted():
    model = assert_every_promise(PlainList(), X)
    assert model.steps[1] is model.step1
    assert model.table["last"][1] is model.last


def test_activations_that_are_kept_where_torch_does_not_see_them_are_listed_and_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Unregistered())
    plan = find_activations(model, X)
    assert [site.reason is None for site in plan] == [True, False, False]
    assert "not registered in the model; keep it in an nn.ModuleList" in plan["2.tanh_0"].reason
    assert list(units(assert_every_promise(model, X))) == ["1"]


# Modules with a will of their own


class Sealed(Body):
    """Forbids new attributes."""

    def __init__(self):
        super().__init__()
        self.sealed = True

    def __setattr__(self, name, value):
        if "sealed" in vars(self) and name != "training":
            raise AttributeError(f"{name}: this module is sealed")
        super().__setattr__(name, value)


class Forwarding(Body):
    """Looks up what it lacks in another module."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("linear"), name)


class AnswersAll(Body):
    """Has an answer to any name."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return None


class WithLock(Body):
    """Neither copied nor pickled without its __getstate__ and __setstate__."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


class WithReduce(Body):
    def __init__(self, size):
        super().__init__()
        self.size, self.stream = size, (i for i in range(size))

    def __reduce__(self):
        state = {name: value for name, value in vars(self).items() if name != "stream"}
        return type(self), (self.size,), state


class WithDeepcopy(Body):
    copied = 0

    def __deepcopy__(self, memo):
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        vars(clone).update(copy.deepcopy(vars(self), memo))
        clone.copied = self.copied + 1
        return clone


@pytest.mark.parametrize(
    "make",
    [Sealed, Forwarding, AnswersAll, WithLock, functools.partial(WithReduce, 3), WithDeepcopy],
)
def test_how_a_module_wants_to_be_asked_and_copied_is_honoured_after_the_conversion(make):
    model = assert_every_promise(make(), X)
    if isinstance(model, WithDeepcopy):
        assert copy.deepcopy(model).copied == model.copied + 1


def test_a_forward_patched_on_the_instance_keeps_running_around_converted_children():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    original = model.forward
    model.forward = lambda x: original(x) * 2
    with torch.no_grad():
        before, state = model(X), copy.deepcopy(model.state_dict())
        convert(model, example_input=X)
        assert torch.equal(model(X), before)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        model[2].log_alpha.fill_(-8.0)
        assert torch.equal(model(X), torch.sin(model[1](model[0](X))) * 2)


@pytest.mark.parametrize("bound", [True, False])
def test_activations_inside_a_patched_forward_are_listed_and_stay(bound):
    def forward(self, x):
        return F.gelu(self.act(x))

    model = Body()
    model.forward = types.MethodType(forward, model) if bound else lambda x: forward(model, x)
    plan = find_activations(model, X)
    reasons = {str(site.source): site.reason for site in plan}
    assert reasons == {"relu": None, "gelu": "its caller's forward is replaced on the instance"}
    convert(model, example_input=X)
    assert list(units(model)) == ["act"]


# Weights that are computed


class Scale(nn.Module):
    def forward(self, weight):
        return weight * 2


class Weighted(nn.Module):
    """Its own weight may be parametrized, and its activations have it rewritten."""

    def __init__(self):
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.randn(4, 4)), nn.ReLU()

    def forward(self, x):
        return self.act(F.gelu(F.linear(self.act(x), self.weight)) - 0.1)


@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        pytest.param(
            nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight")
        ),
        nn.utils.spectral_norm,
    ],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_computed_weights_stay_as_they_are(norm):
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.ReLU(), norm(nn.Linear(4, 4)))
    with torch.no_grad():
        model(X)
    assert_every_promise(model, X, copies=(copy.deepcopy,))  # torch pickles none of the new ones


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight")
def test_a_weight_that_still_has_its_graph_does_not_keep_a_model_from_being_examined():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    model(X)  # from now on deepcopy refuses the model
    weight = model[0].weight
    convert(model, example_input=X)
    assert model[0].weight is weight


def test_parametrizations_of_a_rewritten_caller_come_and_go_as_before():
    model = Weighted()
    parametrize.register_parametrization(model, "weight", Scale())
    assert_every_promise(model, X, copies=(copy.deepcopy,))
    before = model(X)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)  # torch's own refusal
    parametrize.remove_parametrizations(model, "weight")
    assert torch.equal(model(X), before)
    assert len(units(model)) == 3
    assert type(revert(model)) is Weighted


def test_parametrizations_added_after_the_conversion_survive_revert():
    model = convert(Weighted().eval(), example_input=X)
    parametrize.register_parametrization(model, "weight", Scale())
    before = model(X)
    revert(model)
    assert not units(model)
    assert parametrize.type_before_parametrizations(model) is Weighted
    assert torch.equal(model(X), before)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is Weighted
