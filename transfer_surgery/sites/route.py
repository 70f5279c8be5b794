"""The way from a caller's ``forward`` to an activation call, as expressions in the source.

A `Route` is text and positions: what has to be edited so that the call goes to a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from transfer_surgery.activations import Activation
from transfer_surgery.sites.source import Function, Position


class NoRouteError(Exception):
    """A call that cannot be edited in the source; the message says why.

    Attributes:
        expression: the call's own, where that is known.
    """

    expression: Expression | None = None


class Expression(NamedTuple):
    """An expression in the source."""

    function: Function
    position: Position


@dataclass(frozen=True)
class Hop:
    """A call on the way, of a function that has to be edited too.

    Attributes:
        function: the function that makes the call.
        position: of the expression that gives the called function; or of all of the call, where it
            `is_bound`.
        is_bound: whether it is a property, or calls a method of ``super()``.
        method: name of the caller's own method that it looks up and calls, if that is what it does.
    """

    function: Function
    position: Position
    is_bound: bool = False
    method: str | None = None


@dataclass(frozen=True)
class End:
    """The expression that becomes a call of the unit.

    Attributes:
        function: the function that it is in.
        position: of the expression.
        inputs: positions of what the unit is given; None: the arguments of the call as they are.
        expected: None where the expression is a call that never means anything else. Otherwise it
            is the expression that gives what is called, and this is what that has to be: an
            activation of torch, or the names that lead from the caller to a module.
        is_method: whether it gives a method of a tensor.
        numbers: in a formula the expressions that gave a number, and the number.
    """

    function: Function
    position: Position
    inputs: tuple[Position, ...] | None
    expected: Activation | tuple[str, ...] | None = None
    is_method: bool = False
    numbers: tuple[tuple[Position, float], ...] = ()


@dataclass(frozen=True)
class Route:
    """All expressions from a caller's ``forward`` to one activation call."""

    hops: tuple[Hop, ...]
    end: End
    again: bool
    """Whether ``torch.utils.checkpoint`` or the like runs a part of it again in backward."""

    @property
    def steps(self) -> tuple[Hop | End, ...]:
        """What is replaced, one expression for each function on the way."""
        return (*self.hops, self.end)


class Way(NamedTuple):
    """The steps of a route from one function on, and the units at its end, which take turns.

    A unit is a name in the caller; None stands for a call that stays as it is.
    """

    steps: tuple[Hop | End, ...]
    units: tuple[str | None, ...]

    @property
    def function(self) -> Function:
        return self.steps[0].function

    @property
    def several(self) -> bool:
        return len(self.units) > 1

    @property
    def places(self) -> set[Expression]:
        """The expressions that are replaced."""
        return {Expression(step.function, step.position) for step in self.steps}
