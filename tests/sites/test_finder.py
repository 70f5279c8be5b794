"""What the finder sees: every mode for real where it has to be, roles, axes, what stays and why."""

import collections
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X, assert_every_promise, units
from transfer_surgery import PerChannel, convert, find_activations


class Around(nn.Module):
    """Something between two layers, beside a ReLU."""

    def __init__(self, act):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu, self.act = nn.ReLU(), act

    def forward(self, x):
        return self.act(self.second(self.relu(self.first(x)))) * 2


@pytest.mark.parametrize(
    "act", [nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Hardshrink(0.3), nn.Softshrink()]
)
def test_every_elementwise_activation_of_torch_is_found(act):
    model = assert_every_promise(Around(act), X)
    assert list(units(model)) == ["relu", "act"]


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


def test_scripted_parts_are_left_alone_and_noted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    plan = find_activations(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), scripted), X)
    assert [str(site.source) for site in plan] == ["relu"]
    assert "2 is TorchScript: not examined" in str(plan.notes)


class Products(nn.Module):
    """What gives the channels their axis: the function that is between the input and a ReLU."""

    def __init__(self, made):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4)
        self.image, self.made = nn.Conv2d(4, 6, 1), made
        self.register_buffer("nodes", torch.randn(5, 5))

    def forward(self, x):
        return F.relu(self.made(self, x)) * 2


TOKENS, IMAGE = torch.randn(2, 5, 4), torch.randn(2, 4, 3, 5)
AXES = {
    "weight @ tokens": (lambda m, x: m.weight @ x.transpose(1, 2), TOKENS, -2),
    "tokens @ weight": (lambda m, x: x @ m.weight.t(), TOKENS, -1),
    "bmm": (lambda m, x: torch.bmm(m.weight.expand(2, -1, -1), x.mT), TOKENS, -2),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[:, :1, :1], m.weight.expand(2, -1, -1), x.mT),
        TOKENS,
        -2,
    ),
    "einsum": (lambda m, x: torch.einsum("oc,blc->bol", m.weight, x), TOKENS, 1),
    "nodes @ features": (lambda m, x: m.nodes @ m.linear(x), TOKENS, -1),
    "scores of attention": (lambda m, x: m.linear(x) @ x.mT / 2 + 1, TOKENS, 0),
    "scores by einsum": (lambda m, x: torch.einsum("bqc,bkc->bqk", x, m.linear(x)), TOKENS, 0),
    "transposed": (lambda m, x: m.linear(x).transpose(1, 2), TOKENS, 1),
    "halves": (lambda m, x: m.linear(x).permute(0, 2, 1).chunk(2, 1)[0], TOKENS, 1),
    "one token": (lambda m, x: m.linear(x)[:, 0], TOKENS, -1),
    "pixels": (lambda m, x: m.image(x).flatten(2), IMAGE, 1),
    "pixels as tokens": (lambda m, x: m.image(x).flatten(2).mT, IMAGE, -1),
    "channels last": (lambda m, x: m.image(x).permute(0, 2, 3, 1), IMAGE, -1),
    "shuffled": (lambda m, x: m.image(x).unflatten(1, (2, 3)).mT.flatten(1, 2), IMAGE, 1),
}


@pytest.mark.parametrize("made", AXES)
def test_the_channels_are_where_the_last_weight_made_them(made):
    function, x, axis = AXES[made]
    model = Products(function).eval()
    before = model(x)
    (site,) = find_activations(model, x)
    assert site.channel_axis == axis
    assert torch.equal(convert(model, example_input=x)(x), before)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.score = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = F.relu(self.linear(x))
        return h * F.leaky_relu(self.score(h).squeeze(-1))[:, None] * torch.relu(h.sum())


def test_an_input_without_an_axis_for_channels_gets_one_gate_and_trains():
    model = assert_every_promise(Scores(), X)
    assert model.leaky_relu_0.log_alpha.shape == model.relu_1.log_alpha.shape == (1,)
    model.train()(X).sum().backward()
    assert all(unit.log_alpha.grad is not None for unit in units(model).values())
    with pytest.raises(ValueError, match=r"granularity=\{'\w+': 'layer', '\*': ") as error:
        convert(Scores(), granularity=PerChannel(1), example_input=X)
    wanted = eval(str(error.value).partition("granularity=")[2].rstrip("."))
    convert(Scores(), granularity=wanted, example_input=X)


def test_an_image_without_the_axis_of_the_batch_is_refused_with_that_reason():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    convert(model, example_input=torch.zeros(2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"^1: the input has 3 axes .* axis of the batch: x\[None\]"
    ):
        model(torch.randn(3, 4, 4))


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse_coo"])
def test_sparse_tensors_do_not_hide_activations(layout):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x, adjacency):
            return torch.sparse.mm(adjacency, self.act(torch.sparse.mm(adjacency, self.linear(x))))

    (site,) = find_activations(Graph(), (torch.randn(5, 4), getattr(torch.eye(5), layout)()))
    assert site.path == "act"


ROLES = {
    "a head": (lambda m, h: (h, torch.relu(m.linear(h))), "output"),
    "a head without its last axis": (lambda m, h: (h, [F.relu(m.score(h)).squeeze(-1)]), "output"),
    "a positive head": (lambda m, h: {"a": h, "b": 10 * (F.elu(m.linear(h)) + 1)}, "output"),
    "a head that is read again": (lambda m, h: (r := F.relu(m.linear(h)), m.score(r)), "hidden"),
    "a soft cap": (lambda m, h: F.relu(30 * torch.tanh(m.linear(h) / 30)), "bounding"),
    "a soft cap alone": (lambda m, h: m.score(30 * torch.tanh(m.linear(h) / 30)), "hidden"),
    "a step size": (lambda m, h: m.score(h * torch.exp(-F.softplus(m.linear(h)))), "bounding"),
    "softplus between layers": (lambda m, h: m.score(F.softplus(m.linear(h))), "hidden"),
    "SwiGLU": (lambda m, h: m.score(F.silu(m.linear(h)) * h), "hidden"),
}


@pytest.mark.parametrize("what", ROLES)
def test_roles_follow_from_what_is_done_with_the_result(what):
    class Network(Scores):
        def forward(self, x):
            return ROLES[what][0](self, x)

    sites = find_activations(Network(), X)
    assert next(site.role for site in sites if site.reason is None) == ROLES[what][1]


class Training(nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.linear, self.head, self.fails = nn.Linear(4, 4), nn.Tanh(), fails

    def forward(self, x):
        h = F.relu(self.linear(x))
        if self.training and self.fails:
            raise ValueError("no targets")
        return self.head(h) - 0.1 if self.training and torch.rand(1) < 2 else h


def test_a_mode_that_values_steer_is_run_for_real_and_one_that_fails_is_warned_of():
    assert find_activations(Training(), X)["head"].modes == ("train",)
    with pytest.warns(RuntimeWarning, match="train mode could not be examined.*no targets") as told:
        convert(Training(fails=True), example_input=X)
    assert [warning.filename for warning in told] == [__file__]  # the line of the caller


class Hooked(Written):
    def forward(self, x):
        h = F.relu(self.linear(x))
        h.register_hook(lambda g: g * 0.1)
        return h


class Forces(Written):
    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.relu(self.linear(x)).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("cls", [Hooked, Forces])
def test_a_forward_that_needs_gradients_gets_them(cls):
    assert [site.path for site in find_activations(cls(), X)] == ["relu_0"]


@pytest.mark.parametrize("written", ["in its class", "elsewhere"])
def test_hooks_that_a_model_needs_run_when_it_is_examined(written):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), None

        def forward(self, x):
            if self.head is None:
                self.head = self.body.register_forward_hook(self.keep)
            self.body(x)
            return self.kept * 2

        def keep(self, module, args, output):
            self.kept = output

    def keep(module, args, output):
        model.kept = output

    model = Own().eval()
    if written == "elsewhere":  # outside of the class, as libraries of hooks do
        model.head = model.body.register_forward_hook(keep)
    with torch.no_grad():
        before = model(X)
        del model.kept
        assert [site.path for site in find_activations(model, X)] == ["body.1"]
        assert torch.equal(convert(model, example_input=X)(X), before)


class Settings(dict):
    """Attributes are items: an unknown one is a KeyError, which getattr does not catch."""

    def __getattr__(self, name):
        if name.startswith("__deepcopy"):
            raise AttributeError(name)
        return self[name]

    def __call__(self, x):
        return x + len(self)


HELPERS = {"relu": lambda settings, x: F.relu(x)}


class Unseen(Written):
    def forward(self, x):
        if self.linear.in_features > 4:
            return SETTINGS.library.relu(x)  # noqa: F821 - the test puts it there
        return F.relu(self.linear(x)) * 2


class Looked(Written):
    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, x):
        return next(map(functools.partial(HELPERS["relu"], self.settings), [self.linear(x)])) * 2


class Called(Looked):
    def forward(self, x):
        return self.linear(F.relu6(self.settings(self.linear(x)) + 3) / 6)


class Held(Written):
    settings = Settings()

    def forward(self, x):
        return self.act(x) * 2

    def act(self, x):
        return F.relu(self.linear(x))


@pytest.mark.parametrize(
    ("cls", "name"),
    [(Unseen, "relu_0"), (Looked, "relu_0"), (Called, "hardsigmoid_0"), (Held, "relu_0")],
)
def test_objects_whose_attributes_raise_are_in_nobodys_way(cls, name, monkeypatch):
    monkeypatch.setitem(globals(), "SETTINGS", Settings())  # pytest reads attributes of others
    model = assert_every_promise(cls(), X)
    assert list(units(model)) == [name]


def test_the_message_names_the_line_of_the_model_that_fails():
    class Failing(nn.Module):
        def forward(self, x):
            return F.relu(x) @ torch.ones(3)

    with pytest.raises(ValueError, match=r"example input, at test_finder.py:\d+ \(RuntimeError: "):
        find_activations(Failing(), X)


RUNS = collections.Counter()


class Noted(nn.Module):
    """Its forwards are counted in RUNS, by class and training flag."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        RUNS[type(self).__name__, self.training] += 1
        return torch.tanh(self.linear(self.act(F.gelu(self.act(x)))))


class Outer(Noted):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([Noted(), Noted()])

    def forward(self, x):
        for module in (*self.inner, self.inner[0]):
            x = module(x)
        return super().forward(x)


def test_each_module_runs_once_per_mode_and_call_when_a_model_is_converted():
    model = Outer()
    RUNS.clear()
    model.eval()(X)
    model.train()(X)
    expected = RUNS.copy()
    assert expected["Noted", True] == 3
    RUNS.clear()
    convert(model, example_input=X)
    assert expected == RUNS
