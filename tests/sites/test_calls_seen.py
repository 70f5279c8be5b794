"""Which calls count as activations, what depends on the input, and what is said of the others."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import assert_every_promise, units
from transfer_surgery import convert, find_activations, revert

X = torch.linspace(-3, 3, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5)


def test_a_call_without_source_is_intercepted_and_the_plan_says_why():
    namespace = {"nn": nn, "F": F}
    code = "class Typed(nn.Module):\n    def forward(self, x):\n        return F.relu(x) - 0.1"
    exec(compile(code, "<typed>", "exec"), namespace)
    model = namespace["Typed"]().eval()
    before = model(X)
    plan = find_activations(model, X)
    assert plan["relu_0"].way == "intercept"
    assert "relu_0: intercepted, because there is no source for <typed>" in plan.unexamined
    assert torch.equal(convert(model, plan=plan)(X), before)
    model.relu_0.log_alpha.data.fill_(-8.0)
    assert torch.equal(model(X), torch.sin(X) - 0.1)


WITHOUT_SOURCE = """
class Typed(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child, self.act = child, nn.SiLU()

    def forward(self, x):
        return self.act(F.relu(self.act(x)) - 0.1)
"""


@pytest.fixture
def without_source():
    namespace = {"nn": nn, "F": F}
    exec(compile(WITHOUT_SOURCE, "<typed>", "exec"), namespace)
    return namespace["Typed"]


def test_a_call_is_not_intercepted_where_that_would_turn_a_fused_path_off(without_source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Linear(4, 4))
    child = nn.Sequential(nn.MultiheadAttention(4, 2), scripted)
    plan = find_activations(without_source(child), X)
    assert all("turn MultiheadAttention's fused path off" in site.reason for site in plan)


def test_an_activation_in_the_hook_of_an_intercepted_one_takes_no_gates(without_source):
    model = without_source(nn.Linear(4, 4))
    model.act.register_forward_pre_hook(lambda _, args: (F.gelu(args[0]),))
    assert len(units(assert_every_promise(model, X, copies=()))) == 3


def test_a_step_whose_first_input_is_a_constant_still_depends_on_the_input():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            state = torch.zeros_like(x)
            for _ in range(3):
                state = self.step(state) + x
            return state

    (site,) = find_activations(Recurrent(), torch.zeros(2, 4))
    assert (site.path, site.calls, site.reason) == ("step.1", 3, None)


@pytest.mark.parametrize("late", [True, 1])
def test_a_branch_that_did_not_run_at_conversion_warns_when_it_runs(late):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.late = nn.Linear(4, 4), False

        def forward(self, x):
            x = self.layer(F.relu(x))
            return torch.tanh(x) if self.late else x

    model, x = Late().eval(), torch.randn(3, 4)
    convert(model, example_input=x)
    model(x)
    model.late = late
    with pytest.warns(
        RuntimeWarning, match=r"Late calls tanh \(.*forward, line 3 of it\) in a branch"
    ):
        after = model(x)
    assert torch.equal(after, revert(model)(x))


def test_a_module_that_changes_the_result_of_its_activation_in_place_is_no_activation():
    class Scaled(nn.Module):
        def forward(self, x):
            return F.gelu(x).mul_(1.7)

    model, x = nn.Sequential(nn.Linear(4, 4), Scaled()).eval(), torch.randn(3, 4)
    before = model(x)
    assert find_activations(model, x).rows[0].path == "1.gelu_0"
    assert torch.equal(convert(model, example_input=x)(x), before)


def test_what_is_written_into_new_tensors_depends_on_the_input():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            pooled, copied = torch.zeros(2, 4), x.new_empty(2, 4)
            pooled[torch.tensor([0, 1])] = self.first(x)
            copied[0].copy_(self.first(x)[1])
            return self.act(self.second(pooled)) + F.relu(copied)

    plan = find_activations(Pooled(), torch.zeros(2, 4))
    assert [site.reason for site in plan] == [None, None]
