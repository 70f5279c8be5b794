"""Ways to call an activation that the source does not show: the call is redirected as it runs."""

import functools

import torch
import torch.nn.functional as F

from tests.helpers.ways_to_call import Helper, Parts, decorated


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


class SameDecorator(Helper):
    """The super method and its override are one code: that of their decorator."""

    @decorated
    def forward(self, x):
        return F.relu(super().fixed(x) + 0.5)


class SameDecoratorBelow(SameDecorator):
    @decorated
    def forward(self, x):
        return super().forward(self.linear(x)) - 0.1


INTERCEPTED = (Walrus, SameDecoratorBelow, Dispatched)
