"""Calls that look like others and are none: they are listed with the reason, or go on as before."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X, units
from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import find_activations


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class WritesElsewhere(Layers):
    def forward(self, x):
        h = self.one(x).detach()
        kept = torch.empty_like(h)
        torch.tanh(h, out=kept)
        return kept + F.gelu(self.two(x))


class InASlice(Layers):
    def forward(self, x):
        return F.gelu(self.steps(x)) + F.silu(self.steps[1:](x))


class ByMode(Layers):
    def forward(self, x):
        act = F.relu if self.training else F.elu
        return F.gelu(self.one(x)) + act(self.two(x))


class SlopeByMode(Layers):
    def forward(self, x):
        return F.gelu(self.one(x)) + F.leaky_relu(x, 0.3 if self.training else 0.1)


class InHooks(Layers):
    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(InHooks.before)
        self.one.register_forward_hook(InHooks.after)

    def before(self, inputs):
        return (F.elu(inputs[0]),)

    def after(self, inputs, output):
        return F.elu(output)

    def forward(self, x):
        return F.gelu(self.one(x))


class InCall(Layers):
    def __call__(self, x):
        return F.elu(super().__call__(x))

    def forward(self, x):
        return F.gelu(self.one(x))


class Swish(torch.autograd.Function):
    """A forward and a backward that belong together."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class InFunction(Layers):
    def forward(self, x):
        return F.gelu(self.one(x)) + Swish.apply(self.two(x))


class ANestedTensor(Layers):
    def forward(self, x):
        h = F.gelu(self.one(x))
        nested = torch.nested.as_nested_tensor([h[:1], h[1:]])
        return torch.nested.to_padded_tensor(F.relu(nested), 0.0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.elu(self.layer(x))


TABLE = {Block: 2.0}


class OfBlocks(Layers):
    def __init__(self):
        super().__init__()
        self.block = Block()


class ComparesClasses(OfBlocks):
    def forward(self, x):
        return F.gelu(self.block(x) * (2.0 if type(self.block) is Block else 1.0))


class LooksClassesUp(OfBlocks):
    def scale(self, module):
        return TABLE.get(module.__class__, 1.0)

    def forward(self, x):
        return F.gelu(self.block(x) * self.scale(self.block))


class AsksForItsOwn(Block):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


class Child(Layers):
    def __init__(self):
        super().__init__()
        self.block = AsksForItsOwn()

    def forward(self, x):
        return F.gelu(self.block(x))


LEFT = {
    ANestedTensor: ("relu", "its input is a nested tensor"),
    ComparesClasses: ("elu", "ComparesClasses.forward asks for the class"),
    LooksClassesUp: ("elu", "LooksClassesUp.scale asks for the class"),
    Child: ("elu", "AsksForItsOwn.forward asks for the class"),
    WritesElsewhere: ("tanh", "it writes its result into out="),
    InASlice: ("relu", "the module that calls it is not registered"),
    ByMode: ("elu", r"in training it is another activation (relu)"),
    SlopeByMode: ("leaky_relu", "in training it is another activation"),
    InHooks: ("elu", "it runs outside of forward"),
    InFunction: ("silu", "it runs in an autograd.Function"),
    InCall: ("elu", "it runs outside of forward"),
}


@pytest.mark.parametrize("cls", LEFT, ids=lambda cls: cls.__name__)
def test_what_cannot_have_gates_is_listed_and_stays_without_a_warning(cls):
    model = cls()
    left = [site for site in find_activations(model, X) if site.reason is not None]
    name, reason = LEFT[cls]
    assert {site.source.name for site in left} == {name}
    assert all(site.reason.startswith(reason) for site in left)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_runs(model, converted(model, X), X)


class Static(nn.Module):
    @staticmethod
    def forward(x):
        return F.relu(x) - 0.1


class OfClass(nn.Module):
    @classmethod
    def forward(cls, x):
        return F.relu(x) - 0.1


@pytest.mark.parametrize("cls", [Static, OfClass])
def test_a_forward_without_the_module_is_intercepted(cls):
    model = cls()
    (site,) = find_activations(model, X)
    assert (site.way, site.why) == ("intercept", "its forward is not given the module")
    twin = converted(model, X)
    assert_same_runs(model, twin, X)
    before = twin.eval()(X)
    units(twin)["relu_0"].log_alpha.data.fill_(-8.0)
    assert not torch.equal(twin(X), before)


class MakesItsLike(Layers):
    """A new module of its class is one that nobody has converted."""

    def forward(self, x, deep=True):
        if not deep:
            return F.gelu(self.two(x))
        with torch.random.fork_rng():
            like = type(self)()
        like.load_state_dict({"one.bias": self.one.bias}, strict=False)
        return F.gelu(self.two(x)) + like(x, False).detach()


def test_the_class_of_a_converted_module_makes_plain_ones():
    model = MakesItsLike()
    twin = converted(model, X)
    like = type(twin)()
    assert type(like) is MakesItsLike
    assert not units(like)
    assert_same_runs(model, twin, X)
    (unit,) = units(twin).values()
    before = twin.eval()(X)
    unit.log_alpha.data.fill_(-8.0)
    assert not torch.equal(twin(X), before)


class KeywordHooks(Layers):
    def __init__(self):
        super().__init__()
        self.one.register_forward_pre_hook(KeywordHooks.before, with_kwargs=True)
        self.one.register_forward_hook(KeywordHooks.after, with_kwargs=True)

    @staticmethod
    def before(module, args, kwargs):
        return args, {"input": 2 * kwargs["input"]}

    @staticmethod
    def after(module, args, kwargs, output):
        return output + kwargs["input"]

    def forward(self, x):
        return F.gelu(self.one(input=x))


def test_hooks_that_take_keywords_are_examined_with_them():
    model = KeywordHooks()
    assert_same_runs(model, converted(model, X), X)


class KeepsWhatIsOverwritten(Layers):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        self.kept = self.one(x)
        return self.two(self.act(self.kept))


class LooksAtWhatIsOverwritten(Layers):
    def forward(self, x):
        self.kept = self.one(x)
        F.relu_(self.kept)
        if bool((self.kept < 0).any()):
            raise ValueError("not a ReLU")
        return self.two(self.kept)


@pytest.mark.parametrize("cls", [KeepsWhatIsOverwritten, LooksAtWhatIsOverwritten])
def test_what_is_overwritten_in_place_is_seen_by_whoever_looks_at_it(cls):
    original = cls().eval()
    model = converted(original, X)
    assert torch.equal(model(X), original(X))
    assert torch.equal(model.kept, original.kept)


SLOPE = 0.1


class OfGlobal(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, SLOPE)


def test_a_module_that_computes_with_a_global_number_follows_it(monkeypatch):
    original = nn.Sequential(nn.Linear(4, 4), OfGlobal()).eval()
    model = converted(original, X)
    monkeypatch.setitem(globals(), "SLOPE", 0.7)
    with pytest.warns(RuntimeWarning, match="leaky_relu .* with other settings"):
        assert torch.equal(model(X), original(X))
