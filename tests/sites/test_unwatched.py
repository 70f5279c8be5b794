"""Forwards with threads: modules in them are converted; other activations there are reported."""

import dataclasses
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X, units
from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import convert, find_activations


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU()

    def branch(self, x):
        return F.relu(self.one(x)).layer_norm()


class InAPool(Layers):
    def branch(self, x):
        return F.relu(self.one(x))

    def forward(self, x):
        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(self.branch, (x, 2 * x))
        return F.silu(self.two(one + other))


class InAThread(Layers):
    def branch(self, x, out):
        out.append(self.one(x).relu())

    def forward(self, x):
        out = []
        thread = threading.Thread(target=self.branch, args=(x, out))
        thread.start()
        thread.join()
        return F.silu(self.two(out[0]))


class LooksAtValues(InAPool):
    def forward(self, x):
        return x if float(x.sum()) > 1e9 else super().forward(x)


class WithoutGradients(InAPool):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class WithoutAGraph(InAPool):
    @torch.no_grad()
    def branch(self, x):
        return super().branch(x)


class CountsInAFrozenParameter(InAPool):
    def __init__(self):
        super().__init__()
        self.runs = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        self.runs.add_(1)
        return super().forward(x)


THREADS = (InAPool, InAThread, LooksAtValues, WithoutGradients, CountsInAFrozenParameter)


@pytest.mark.parametrize("cls", THREADS, ids=lambda cls: cls.__name__)
def test_an_activation_in_another_thread_is_reported_with_its_line(cls):
    plan = find_activations(cls(), X)
    assert [site.path for site in plan] == ["silu_0"]
    (note,) = plan.unexamined
    line = inspect.getsourcelines(cls.branch)[1] + 1
    assert note.startswith(f"relu ran {1 if cls is InAThread else 2}x")
    assert f"test_unwatched.py:{line})" in note


def test_values_that_no_graph_tells_of_are_noted():
    (note,) = find_activations(WithoutAGraph(), X).unexamined
    assert note.startswith("some values came from code that nobody can watch")


def test_a_branch_that_is_taken_where_values_cannot_be_read_is_not_the_one_that_is_examined():
    class Net(Layers):
        def forward(self, x):
            try:
                large = x.max().item() > 0
            except Exception:
                return torch.tanh(self.one(x))
            return F.relu(self.one(x)) if large else x

    assert [site.path for site in find_activations(Net(), X)] == ["relu_0"]


def test_a_model_whose_activations_all_run_unseen_is_refused_with_the_reason():
    class Net(InAPool):
        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                return self.two(pool.submit(self.branch, x).result())

    with pytest.raises(ValueError, match="relu ran 1x where nobody can look"):
        convert(Net(), example_input=X)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return F.elu(self.layer(x)) + self.act(x)


def test_modules_that_other_threads_call_are_converted():
    class Net(Layers):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            with ThreadPoolExecutor(2) as pool:
                one, other = pool.map(lambda block: block(x), self.blocks)
                last = pool.submit(self.act, self.two(one + other)).result()
            return F.silu(last)

    model = Net()
    assert_same_runs(model, converted(model, X), X)
    twin = convert(model, example_input=X)
    paths = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("elu_0", "act")]
    assert set(units(twin)) == {*paths, "act", "silu_0"}


def test_a_module_that_fails_and_is_caught_leaves_the_finder_where_it_was():
    class Fails(Block):
        def forward(self, x):
            super().forward(x)
            raise KeyError

    class Net(Layers):
        def __init__(self):
            super().__init__()
            self.fails = Fails()

        def forward(self, x):
            try:
                self.fails(x)
            except KeyError:
                x = F.silu(self.one(x))
            return self.two(x)

    model = Net()
    plan = find_activations(model, X)
    assert [(s.path, s.caller, s.reason) for s in plan] == [
        ("fails.elu_0", "fails", None),
        ("fails.act", "fails", None),
        ("silu_0", "", None),
    ]
    assert_same_runs(model, converted(model, X), X)


def test_a_hook_that_fails_before_a_module_and_is_caught_leaves_the_finder_where_it_was():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_forward_pre_hook(self.check)

        def check(self, module, args):
            raise KeyError

        def forward(self, x):
            return x

    class Net(Layers):
        def __init__(self):
            super().__init__()
            self.checked = Checked()

        def forward(self, x):
            try:
                self.checked(x)
            except KeyError:
                x = F.silu(self.one(x))
            return self.two(x)

    assert [(site.path, site.caller) for site in find_activations(Net(), X)] == [("silu_0", "")]


CONSTANT = torch.ones(4)


@dataclasses.dataclass
class Scale:
    """Callable and, as it can be compared, not hashable."""

    by: float

    def __call__(self, x):
        return self.by * x


TWICE = Scale(2.0)


class Honest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.relu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Strange(Layers):
    """Values that nobody has seen being made, but not by an unseen activation."""

    def norm(self, x):
        return F.layer_norm(self.one(x).softmax(-1), (4,)).logsumexp(-1, keepdim=True)

    def slope(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.silu(x).sum(), x, create_graph=True)[0]

    def forward(self, x):
        x = x * CONSTANT + torch.vmap(torch.tanh)(self.one(x))
        with ThreadPoolExecutor(1) as pool:
            x = x + pool.submit(self.norm, x).result()
        return self.two(self.slope(Honest.apply(x)) + F.mish(x) * SimpleNamespace(x=x).x)


def test_nothing_is_reported_that_was_seen_or_is_no_activation():
    plan = find_activations(Strange(), X)
    assert sorted(str(site.source) for site in plan) == ["mish", "relu", "silu", "tanh"]
    assert not any("nobody can" in note for note in plan.unexamined)


# torch.compile itself looks at the gradients of what a compiled function is given.
gradients_are_looked_at = pytest.mark.filterwarnings("ignore:The .grad attribute")


class Compiled(Layers):
    def forward(self, x):
        return F.silu(self.step(compiled(x)))

    @torch.compile(backend="eager")
    def step(self, x):
        return F.elu(self.two(x)) - 0.1


@torch.compile(backend="eager")
def compiled(x):
    return F.gelu(x) - 0.1


@gradients_are_looked_at
def test_functions_that_torch_compile_has_made_are_edited_as_they_were_written():
    model = Compiled()
    plan = find_activations(model, X)
    assert {(site.path, site.way) for site in plan} == {
        (f"{name}_0", "edit") for name in ("silu", "elu", "gelu")
    }
    assert plan.unexamined == ()
    assert_same_runs(model, converted(model, X), X, runs=1)
    twin = convert(model, example_input=X).eval()
    before = twin(X)
    for unit in units(twin).values():
        unit.log_alpha.data.fill_(-8.0)
        assert not torch.equal(twin(X), before)
        unit.log_alpha.data.fill_(8.0)


class Branches(Layers):
    def forward(self, x):
        h = F.silu(self.one(x))
        return torch.cond(h.sum() > 0, lambda h: h.sin() + 1, lambda h: h - 1, (h,))


@gradients_are_looked_at
def test_a_forward_with_torch_cond_is_examined():
    model = Branches()
    assert ("silu_0", "edit") in [(site.path, site.way) for site in find_activations(model, X)]
    assert_same_runs(model, converted(model, X), X, runs=1)
