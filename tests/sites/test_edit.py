"""The edited source is the user's own code: tracebacks, copies, compilers, odd ways to call."""

import copy
import gc
import importlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
import traceback
import weakref
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.promises import X, units
from tests.helpers.same_run import assert_same_runs, converted
from tests.helpers.ways_to_call import (
    NETWORKS,
    NOT_COMPILED,
    Function,
    Helper,
    Method,
    Parts,
    Steps,
    Super,
)
from tests.helpers.ways_to_choose import CHOSEN
from tests.helpers.ways_to_intercept import INTERCEPTED
from transfer_surgery import bake, convert, find_activations, revert

EDITED = NETWORKS + CHOSEN


@pytest.mark.parametrize("cls", EDITED + NOT_COMPILED + INTERCEPTED, ids=lambda cls: cls.__name__)
def test_each_way_to_call_an_activation_is_edited_and_each_gate_counts(cls):
    model, way = cls(), "intercept" if cls in INTERCEPTED else "edit"
    assert {site.way for site in find_activations(model, X)} == {way}
    assert_same_runs(model, converted(model, X), X)
    convert(model.eval(), example_input=X)
    before = model(X)
    for path, unit in units(model).items():
        unit.log_alpha.data.fill_(-8.0)
        assert not torch.equal(model(X), before), path
        unit.log_alpha.data.fill_(8.0)
    assert torch.equal(revert(model)(X), before)


COMPILED = [
    pytest.param(cls, marks=[] if cls in (Helper, Method, Function, Steps) else [pytest.mark.slow])
    for cls in EDITED
]


@pytest.mark.parametrize("cls", COMPILED, ids=lambda cls: cls.__name__)
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
from torch.utils.checkpoint import checkpoint


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
    twins = [copy.deepcopy(model)]
    if cls is not Super:  # its forward calls a lambda, which pickle does not take
        del model.written
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert type(twin) is type(model)
        assert torch.equal(twin(X), model(X))


def test_callers_of_one_class_share_their_edited_class():
    model = convert(nn.Sequential(Steps(), Steps()), example_input=X)
    assert type(model[0]) is type(model[1]) is not Steps
    assert isinstance(model[0], Steps)


def test_a_module_in_an_archive_has_its_source_from_its_loader(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("in_an_archive.py", FILE)
    monkeypatch.syspath_prepend(tmp_path / "archive.zip")
    model = importlib.import_module("in_an_archive").Net()
    assert {site.way for site in find_activations(model, X)} == {"edit"}


def hidden_function(function):
    """A decorator whose wrapper does not hold the function itself."""
    held = [function]

    @torch.no_grad()
    def wrapper(*args):
        return held[0](*args)

    wrapper.__wrapped__ = function
    return wrapper


class Hidden(Parts):
    @hidden_function
    def forward(self, x):
        return F.relu(self.linear(x)) - 0.1


def test_a_decorator_that_hides_the_function_never_makes_convert_fail():
    model = Hidden().eval()
    before = model(X)
    convert(model, example_input=X)
    assert torch.equal(model(X), before)
    model.relu_0.log_alpha.data.fill_(-8.0)
    assert not torch.equal(model(X), before)


def test_edited_classes_are_given_back():
    model = convert(Helper(), example_input=X)
    edited = weakref.ref(type(model))
    del model
    gc.collect()
    assert edited() is None


class Strict(type):
    """Refuses a class without a tag."""

    def __new__(cls, name, bases, members, *, tag):
        return super().__new__(cls, name, bases, members)

    def __init__(cls, name, bases, members, *, tag):
        super().__init__(name, bases, members)


class Final(Helper, metaclass=Strict, tag="one"):
    def __init_subclass__(cls):
        raise TypeError("no subclasses, please")


def test_neither_a_metaclass_nor_init_subclass_hears_of_the_edited_class():
    model = Final()
    assert_same_runs(model, converted(model, X), X)
    assert type(revert(convert(model, example_input=X))) is Final


def test_a_model_whose_code_has_changed_since_it_was_saved_runs_the_old_code_with_a_warning(
    module, tmp_path
):
    model = convert(module.Net().eval(), example_input=X)
    torch.save((model, X, model(X)), tmp_path / "model.pt")
    with open(module.__file__, "w") as file:
        file.write(FILE.replace("- 0.1", "- 0.2"))
    program = (
        "import sys, warnings\nimport torch\n"
        f"sys.path[:0] = [{str(tmp_path)!r}]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(x), y)\n"
        "assert any('Net.forward has changed' in str(w.message) for w in caught), caught\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_one_of_two_calls_of_a_method_has_its_unit_alone():
    original = Method().eval()
    model = convert(copy.deepcopy(original), example_input=X, include="tanh_1")
    model.tanh_1.log_alpha.data.fill_(-8.0)
    expected = original.step(original.linear(X)) * (torch.sin(X) - 0.1)
    assert torch.equal(model(X), expected)
    assert torch.equal(model.step(X), original.step(X))


class Autoencoder(nn.Module):
    """Users call its parts, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def code(self, x):
        return F.relu(self.linear(x)) + self.inner(x)

    def inner(self, x):
        return F.silu(x) - 0.1

    def decode(self, x):
        return checkpoint(self.last_layer, x, use_reentrant=False) * 2

    def last_layer(self, x):
        return F.gelu(self.last(x))

    def forward(self, x):
        return self.decode(self.code(x)) - 0.1


@torch.no_grad()
def test_methods_that_forward_calls_have_the_same_gates_when_others_call_them():
    original = Autoencoder().eval()
    model = convert(copy.deepcopy(original), example_input=X)
    assert len(units(model)) == 3
    for unit in units(model).values():
        unit.log_alpha.fill_(-8.0)
    expected = torch.sin(original.linear(X)) + (torch.sin(X) - 0.1)
    for twin in (model, pickle.loads(pickle.dumps(model)), bake(copy.deepcopy(model))):
        assert torch.equal(twin.code(X), expected)
        assert torch.equal(twin.decode(X), torch.sin(original.last(X)) * 2)
        assert torch.equal(twin(X), twin.decode(twin.code(X)) - 0.1)
    assert torch.equal(revert(model).code(X), original.code(X))
