"""Ways to call an activation where what is called varies, or is looked up, bound or handed on."""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers.ways_to_call import Parts, helper, noted


class Partial(Parts):
    def forward(self, x):
        return functools.partial(helper)(self.linear(x)) * 2


class OtherFunctions(Parts):
    def forward(self, x):
        for function in (F.relu, torch.neg, torch.tanh):
            x = function(self.linear(x)) - 0.1
        return x


def plain(x):
    return x * 2


class Among(Parts):
    """The function with the activation is one of several in its place."""

    def forward(self, x):
        for function in (helper, torch.neg, plain, functools.partial(torch.mul, other=2)):
            x = function(self.linear(x))
        return x


@torch.no_grad()
def frozen(x):
    return F.relu(x) - 0.1


@torch.no_grad()
def frozen_plain(x):
    return x * 2


class FrozenAmong(Parts):
    """Functions whose decorator is one and the same code."""

    def forward(self, x):
        for function in (frozen, frozen_plain):
            x = function(self.linear(x))
        return x


class Closures(Parts):
    """One text, several functions, which differ in the default of a keyword."""

    def __init__(self):
        super().__init__()
        self.functions = []
        for scale in (0.5, 2.0):

            def act(x, *, scale=scale):
                return F.relu(x) * scale

            self.functions.append(act)

    def forward(self, x):
        for function in self.functions:
            x = function(x) - 0.1
        return x


class Various(Parts):
    """Functions and activations are called by one expression."""

    def forward(self, x):
        for function in (helper, noted, torch.neg, torch.tanh, F.relu):
            x = function(self.linear(x)) - 0.1
        return x


class Choice(Parts):
    """One expression calls one activation or another."""

    other = False

    def forward(self, x):
        return (F.relu if self.other else F.gelu)(self.linear(x)) - 0.1


class Bound(Parts):
    """Arguments of an activation are bound before, or unpacked."""

    def __init__(self):
        super().__init__()
        self.leaky = functools.partial(F.leaky_relu, negative_slope=0.2)

    def forward(self, x):
        x = self.leaky(self.linear(x)) + functools.partial(F.elu, alpha=0.5)(x)
        given, named = (self.linear(x),), {"input": x, "approximate": "tanh"}
        return F.selu(*given) + F.gelu(**named) - 0.1


def made():
    def step(x):
        return F.celu(x) - 0.1

    return step


class Looked(Parts):
    """What is called has been looked up, or just been made."""

    def __init__(self):
        super().__init__()
        self.table = {"silu": F.silu, "mish": F.mish}

    def of(self, name):
        return self.table[name]

    def forward(self, x):
        x = self.table.get("silu")(self.linear(x)) + self.of("mish")(x) - 0.1
        act = vars(F)["hardswish"]
        x = made()(x)
        return getattr(F, "relu")(act(x)) + [torch.tanh, F.elu][x.dim() - 1](x)  # noqa: B009


def called(function, x):
    return function(x) - 0.1


class Handed(Parts):
    """An activation is handed to what calls it."""

    def forward(self, x):
        one, two = list(map(F.gelu, (x, self.linear(x))))
        x = called(self.act, one) + called(functools.partial(self.act), two)
        return sum(map(F.silu, [one, x])) + checkpoint(F.relu, two, use_reentrant=False)


def scaled(scale):
    return lambda x: F.gelu(x * scale) - 0.1


class JustMade(Parts):
    """Closures hold what the forward has computed: torch.compile cannot copy them."""

    def shifted(self, shift):
        def step(x):
            return F.selu(self.linear(x) + shift)

        return step

    def forward(self, x):
        mean = x.std()
        step, scale = self.shifted(mean), scaled(mean)
        x = called(scale, x) + step(x) + called(scale, -x)
        return x + called(lambda y: F.elu(y * mean), x)


CHOSEN = (Partial, OtherFunctions, Among, FrozenAmong, Closures)
CHOSEN += (Various, Choice, Bound, Looked, Handed, JustMade)
