"""The edited source is the user's own code: tracebacks, copies, compilers, odd ways to call."""

import copy
import functools
import importlib.util
import inspect
import pickle
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.promises import X, units
from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import convert, find_activations, revert


def helper(x):
    return F.relu(x) - 0.1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Parts(nn.Module):
    """What the networks below are made of."""

    def __init__(self):
        super().__init__()
        self.linear, self.act, self.function = nn.Linear(4, 4), nn.ReLU(), F.gelu
        self.written = lambda h: F.silu(h) - 0.1
        self.layers = nn.ModuleList([self.linear, nn.Linear(4, 4)])

    def step(self, x):
        return torch.tanh(x) - 0.1

    def __private(self, x):
        return F.mish(x)

    @staticmethod
    def fixed(x):
        return F.elu(x)

    @classmethod
    def of_class(cls, x):
        return F.celu(x)

    @property
    def last(self):
        return F.selu(self.kept)

    @torch.no_grad()
    def frozen(self, x):
        return F.hardswish(x)


class Helper(Parts):
    def forward(self, x):
        return helper(self.linear(x)) + helper(x)


class Method(Parts):
    def forward(self, x):
        return self.step(self.linear(x)) * self.step(x)


class Private(Parts):
    def forward(self, x):
        return self._Parts__private(self.linear(x)) * 2


class Fixed(Parts):
    def forward(self, x):
        return self.fixed(self.linear(x)) + self.of_class(x)


class Property(Parts):
    def forward(self, x):
        self.kept = self.linear(x)
        return self.last - 0.1


class Function(Parts):
    def forward(self, x):
        return self.function(self.linear(x)) + self.written(x)


class Super(Function):
    def forward(self, x):
        return F.relu(super().forward(x)) - 0.1


class Checkpoint(Parts):
    def forward(self, x):
        return checkpoint(self.step, self.linear(x), use_reentrant=False) + 0.1


class Decorated(Parts):
    @decorated
    def forward(self, x):
        return F.relu(self.linear(x)) + 1


class Frozen(Parts):
    def forward(self, x):
        return self.frozen(self.linear(x)) + self.linear(x)


class Partial(Parts):
    def forward(self, x):
        return functools.partial(helper)(self.linear(x)) * 2


class Twice(Parts):
    def forward(self, x):
        return self.act(self.linear(self.act(x))) - 0.1


class Steps(Parts):
    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x)) - 0.1
        return x


class Lines(Parts):
    def forward(self, x):
        x = (
            self.linear(x)
            .relu()
            .sub(0.1)
        )  # fmt: skip
        return torch.clamp(
            self.linear(x),
            min=0,
        )


class Shadowed(Parts):
    def forward(me, x):  # noqa: N805
        def inner(self):
            return F.relu(self) - 0.1

        return inner(me.linear(x))


class OtherFunctions(Parts):
    def forward(self, x):
        for function in (F.relu, torch.neg, torch.tanh):
            x = function(self.linear(x)) - 0.1
        return x


NETWORKS = (Helper, Method, Private, Fixed, Property, Function, Super, Checkpoint, Decorated)
NETWORKS += (Frozen, Partial, Twice, Steps, Lines, Shadowed, OtherFunctions)


@pytest.mark.parametrize("cls", NETWORKS, ids=lambda cls: cls.__name__)
def test_each_way_to_call_an_activation_is_edited_and_each_gate_counts(cls):
    model = cls()
    assert {site.way for site in find_activations(model, X)} == {"edit"}
    assert_same_runs(model, converted(model, X), X)
    convert(model.eval(), example_input=X)
    before = model(X)
    for path, unit in units(model).items():
        unit.log_alpha.data.fill_(-8.0)
        assert not torch.equal(model(X), before), path
        unit.log_alpha.data.fill_(8.0)
    assert torch.equal(revert(model)(X), before)


@pytest.mark.parametrize("cls", NETWORKS, ids=lambda cls: cls.__name__)
def test_edited_code_compiles_as_one_graph_where_the_original_does(cls):
    model = convert(cls().eval(), example_input=X)
    for unit in units(model).values():
        unit.log_alpha.data.fill_(-8.0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))


class Failing(Parts):
    def forward(self, x, fails=False):
        x = F.relu(self.linear(x)) - 0.1
        if fails:
            raise RuntimeError("the user's own error")
        return x


def test_a_traceback_shows_the_users_file_and_line():
    model = convert(Failing(), example_input=X)
    with pytest.raises(RuntimeError) as caught:
        model(X, fails=True)
    frame = traceback.extract_tb(caught.tb)[-1]
    lines, first = inspect.getsourcelines(Failing.forward)
    assert (frame.filename, frame.name) == (__file__, "forward")
    assert frame.lineno == first + next(i for i, line in enumerate(lines) if "raise" in line)
    assert frame.line == 'raise RuntimeError("the user\'s own error")'


def test_the_plan_shows_file_line_and_way():
    (site,) = find_activations(Failing(), X)
    _, first = inspect.getsourcelines(Failing.forward)
    assert (site.file, site.line, site.way) == (__file__, first + 1, "edit")
    assert f"test_edit.py:{first + 1}  edit" in str(find_activations(Failing(), X))


FILE = """
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.linear(x)) - 0.1
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "written_to_disk.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("written_to_disk")
    del sys.modules["written_to_disk"]


def test_a_file_that_changed_since_its_import_is_never_edited_in_the_wrong_place(module):
    model = module.Net().eval()
    before = model(X)
    changed = FILE.replace("F.relu(self.linear(x))", "F.gelu(F.relu(self.linear(x)))")
    with open(module.__file__, "w") as file:
        file.write(changed)
    plan = find_activations(model, X)
    assert plan["relu_0"].way == "intercept"
    assert "is not the source that runs" in plan.unexamined[0]
    assert torch.equal(convert(model, plan=plan)(X), before)


def test_a_whole_model_loads_in_a_fresh_process_also_when_its_file_has_moved_on(module, tmp_path):
    model = convert(module.Net().eval(), example_input=X)
    model.relu_0.log_alpha.data.fill_(-8.0)
    torch.save((model, X, model(X)), tmp_path / "model.pt")
    with open(module.__file__, "w") as file:
        file.write("# a line more\n" + FILE)
    program = (
        f"import sys, torch; sys.path[:0] = [{str(tmp_path)!r}]\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("cls", [Helper, Method, Super, Steps], ids=lambda cls: cls.__name__)
def test_copies_share_the_edited_class(cls):
    model = convert(cls().eval(), example_input=X)
    del model.written
    twins = [copy.deepcopy(model)]
    if cls is not Super:
        twins.append(pickle.loads(pickle.dumps(model)))
        for twin in twins:
            assert type(twin) is type(model)
            assert torch.equal(twin(X), model(X))


def test_owners_of_one_class_share_their_edited_class():
    model = convert(nn.Sequential(Steps(), Steps()), example_input=X)
    assert type(model[0]) is type(model[1]) is not Steps
    assert isinstance(model[0], Steps)


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
