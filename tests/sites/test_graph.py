"""Graph modules are edited in their graph: symbolic traces, modules of exported programs."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.helpers.promises import (
    X,
    assert_every_promise,
    assert_refused,
    through_pickle,
    units,
)
from transfer_surgery import bake, convert, find_activations, revert


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act, self.once = nn.Linear(4, 4), nn.SiLU(), nn.ReLU()

    def forward(self, x):
        x = self.act(self.linear(self.act(F.relu(self.linear(x)) + 0.1)))
        x = (x * torch.sigmoid(x) - 0.1).tanh() + 0.1
        x = self.once(0.5 * x * (1 + torch.erf(x / 2**0.5)) - 0.1)
        return F.leaky_relu(x - 0.1, 0.2, inplace=True) * 2


@pytest.fixture
def traced():
    return fx.symbolic_trace(Net()).eval()


def without_numbers(code):
    """Nodes that were made anew have other numbers."""
    return re.sub(r"_\d+\b", "", code)


def assert_every_gate_counts(model, before):
    assert torch.equal(model(X), before)
    for path, unit in units(model).items():
        unit.log_alpha.data.fill_(-8.0)
        assert not torch.equal(model(X), before), path
        unit.log_alpha.data.fill_(8.0)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle, copy.copy])
def test_copies_compile_and_can_be_baked_and_reverted(traced, make_copy):
    before = traced(X)
    model = make_copy(convert(traced, example_input=X))
    assert len(units(model)) == 8
    assert_every_gate_counts(model, before)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), before)
    assert torch.equal(fx.symbolic_trace(bake(copy.deepcopy(model)))(X), before)
    revert(model)
    assert torch.equal(model(X), before)
    assert not units(model)


def test_the_plan_says_fx_and_revert_restores_the_graph(traced):
    plan, code = find_activations(traced, X), traced.code
    assert [(site.path, site.way) for site in plan] == [
        *(("relu_0", "fx"), ("act_0", "fx"), ("act_1", "fx"), ("silu_0", "fx"), ("tanh_0", "fx")),
        *(("gelu_0", "fx"), ("once", "child"), ("leaky_relu_0", "fx")),
    ]
    convert(traced, plan=plan, include="*elu_0")
    assert sorted(units(traced)) == ["gelu_0", "leaky_relu_0", "relu_0"]
    assert without_numbers(revert(traced).code) == without_numbers(code)


def test_the_module_of_an_exported_program():
    model = torch.export.export(Net().eval(), (X,)).module()
    code, before = model.code, model(X)
    plan = find_activations(model, X)
    assert {site.way for site in plan} == {"fx"}
    for module in convert(model, plan=plan).modules():  # eval() is not for exported modules
        module.training = False
    assert_every_gate_counts(model, before)
    assert without_numbers(revert(model).code) == without_numbers(code)


@fx.wrap
def helper(x):
    return F.relu(x) - 0.1


class Wrapped(Net):
    def forward(self, x):
        return torch.tanh(helper(self.linear(x)))


def test_a_call_that_the_graph_does_not_show_is_listed():
    hidden, shown = find_activations(fx.symbolic_trace(Wrapped()), X)
    assert hidden.reason == "it is not in the graph, but in a function that the graph calls"
    assert (shown.reason, shown.way) == (None, "fx")


def test_a_graph_that_is_not_what_runs_is_refused(traced):
    relu = next(node for node in traced.graph.nodes if node.target == F.relu)
    relu.target, relu.kwargs = F.gelu, {}
    assert_refused(traced, ValueError, r"call recompile\(\)")
    traced.recompile()
    assert "gelu_1" in units(convert(traced, example_input=X))


class Operators(Net):
    def forward(self, x):
        x = torch.ops.aten.relu(self.linear(x)) - 0.1
        return torch.ops.aten.leaky_relu.default(x, 0.3) * 2


def test_operators_are_found_under_their_own_names_and_edited():
    plan = find_activations(Operators(), X)
    assert [(site.path, site.way) for site in plan] == [
        ("relu_0", "edit"),
        ("leaky_relu_0", "edit"),
    ]
    assert dict(plan["leaky_relu_0"].source.parameters)["negative_slope"] == 0.3
    assert_every_promise(Operators(), X)
