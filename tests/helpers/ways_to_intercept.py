"""Ways to call an activation that the source does not show: the call is redirected as it runs."""

import copy
import functools

import torch
import torch.nn.functional as F

from tests.helpers.ways_to_call import Helper, Parts, decorated, helper, noted


class SeveralFunctions(Parts):
    def forward(self, x):
        for function in (helper, noted):
            x = function(self.linear(x))
        return x


class FunctionOrActivation(Parts):
    def forward(self, x):
        for function in (helper, torch.tanh):
            x = function(self.linear(x)) - 0.1
        return x


class Walrus(Parts):
    """The formula's input is named in the formula itself."""

    def forward(self, x):
        return (y := self.linear(x)) * torch.sigmoid(y) - 0.1


class Dispatched(Parts):
    """What is called is the attribute of an argument."""

    @functools.singledispatchmethod
    def step(self, x):
        return F.relu(x) - 0.1

    def forward(self, x):
        return self.step(self.linear(x))


class Choice(Parts):
    """One expression calls one activation or another."""

    other = False

    def forward(self, x):
        return (F.relu if self.other else F.gelu)(self.linear(x)) - 0.1


class Counting(Parts):
    """An argument that the unit does not take has an effect."""

    calls = 0

    def slope(self):
        self.calls += 1
        return 0.2

    def forward(self, x):
        return F.leaky_relu(self.linear(x), self.slope()) - 0.1


class SameDecorator(Helper):
    """The super method and its override are one code: that of their decorator."""

    @decorated
    def forward(self, x):
        return F.relu(super().fixed(x) + 0.5)


class SameDecoratorBelow(SameDecorator):
    @decorated
    def forward(self, x):
        return super().forward(self.linear(x)) - 0.1


class CopyOfAChild(Parts):
    """A copy that the forward makes has the hooks of the examination."""

    def forward(self, x):
        return F.relu(copy.deepcopy(self.linear)(x)) - 0.1


INTERCEPTED = (SeveralFunctions, FunctionOrActivation, Walrus, Counting, SameDecoratorBelow)
INTERCEPTED += (Dispatched, Choice, CopyOfAChild)
