"""Each way in which a forward can call an activation, as a network of its own."""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.decorators import passed_on
from tests.helpers.promises import Body


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


def note(function):
    return function


def noted(x):
    return F.relu(x) * (note(noted) is not None) - 0.1


class OwnNames(Parts):
    """The functions read their own names, and those of their classes, as globals."""

    scale = 0.9

    def forward(self, x):
        x = F.relu(self.linear(x)) * OwnNames.scale if isinstance(self, OwnNames) else x
        return noted(x) + super(OwnNames, self).step(x)  # noqa: UP008


def descend(x, depth):
    x = F.relu(x - 0.1 * depth) - 0.1
    return descend(x, depth - 1) if depth else x


class Recursive(Parts):
    def step(self, x, depth):
        if depth:
            return self.step(x + 0.1, depth - 1)
        return torch.tanh(x)

    def forward(self, x):
        return self.step(self.linear(x), 2) + descend(x, 2)


class ForeignDecorator(Parts):
    """The decorator is another module's, and has the names of what it wraps."""

    @passed_on
    def step(self, x):
        return torch.tanh(x) - 0.1

    @passed_on
    def forward(self, x):
        return F.relu(self.step(self.linear(x)) + 0.5)


class TwiceDecorated(Parts):
    @decorated
    def step(self, x):
        return torch.tanh(x) - 0.1

    @decorated
    @decorated
    def forward(self, x):
        return F.relu(self.step(self.linear(x)) + 0.5)


class Defaults(Parts):
    """Lambdas in defaults and annotations come before the function's own code."""

    def __init__(self):
        super().__init__()
        self.written = lambda h, f=lambda v: F.silu(v), *, g=lambda v: v * 2: g(f(h))

    def forward(self, x: (lambda v: v), f=lambda h: F.gelu(h) - 0.1) -> lambda v: v:
        return F.relu(f(self.linear(x)) + 0.5) + self.written(x)


class Formula(Parts):
    def forward(self, x):
        x = self.linear(x)
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))) - 0.1


class Generators(Parts):
    def each(self, x):
        for layer in self.layers:
            yield torch.tanh(layer(x))

    def forward(self, x):
        for i, y in enumerate(self.each(x)):
            x = x + y * (i + 1)
        return sum([F.relu(y) - 0.1 for y in self.every(x)])

    def every(self, x):
        yield from (F.gelu(x) + 0.3, F.silu(x) - 0.1)


class Settings(Parts):
    """What an activation is given beside its input is read when it runs."""

    slope = 0.2

    def forward(self, x):
        return F.leaky_relu(self.linear(x), self.slope) - 0.1


class Again(torch.autograd.Function):
    """A checkpoint of the user's own: backward runs the function again."""

    @staticmethod
    def forward(ctx, function, x, *parameters):
        ctx.function, ctx.inputs = function, (x, *parameters)
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.inputs
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return None, *torch.autograd.grad(y, (x, *parameters), gradient)


class OwnCheckpoint(Parts):
    def inner(self, x):
        return F.relu(self.linear(x)) - 0.1

    def forward(self, x):
        return Again.apply(self.inner, x, *self.linear.parameters())


class OfTheClass(Parts):
    """An activation module that the class has, under a name that its children have, too."""

    shared = nn.SiLU(inplace=True)

    def __init__(self):
        super().__init__()
        self.shared = OfTheClass.shared

    def forward(self, x):
        return self.shared(self.linear(x)) - 0.1


class AsksForType(Parts):
    """The activation module has to stay what it is, for the code asks."""

    def weight(self, layer):
        return 0.1 * isinstance(layer, nn.ReLU)

    def forward(self, x):
        for layer in [self.linear, self.act]:
            x = layer(x) + self.weight(layer)
        return x


class Counting(Parts):
    """An argument that the unit does not take has an effect."""

    calls = 0

    def slope(self):
        self.calls += 1
        return 0.2

    def forward(self, x):
        return F.leaky_relu(self.linear(x), self.slope()) - 0.1


class CopyOfAChild(Parts):
    """A copy that the forward makes has the hooks of the examination."""

    def forward(self, x):
        return F.relu(copy.deepcopy(self.linear)(x)) - 0.1


NETWORKS = (Helper, Method, Private, Fixed, Property, Function, Super, Checkpoint, Decorated)
NETWORKS += (Frozen, Body, Steps, Lines, Shadowed, OwnNames, Recursive, ForeignDecorator)
NETWORKS += (TwiceDecorated, Defaults, Formula, Generators, Settings, OfTheClass, AsksForType)
NETWORKS += (Counting,)
NOT_COMPILED = (OwnCheckpoint, CopyOfAChild)
