"""The way from a caller's ``forward`` to an activation call, as expressions in the source.

A `Route` is text and positions: what has to be edited so that the call goes to a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
        position: of the whole call in it.
        carrier: position of the expression that gives the called function.
        how: ``"call"`` where that is what is called, ``"argument"`` where it is handed to something
            that calls it, ``"super"`` for a method of a base class, ``"property"``.
        method: name of the caller's own method that it looks up and calls, if that is what it does.
    """

    function: Function
    position: Position
    carrier: Position
    how: str
    method: str | None = None


@dataclass(frozen=True)
class End:
    """The expression that becomes a call of the unit.

    Attributes:
        function: the function that it is in.
        position: of the expression.
        inputs: positions of what the unit is given; None: the arguments of the call as they are.
        expected: where the expression may call other things too, what it has to call: a torch
            function, or the names that lead from the caller to a module.
        settings: further arguments that the unit does not take, and the values that it has been
            made for.
    """

    function: Function
    position: Position
    inputs: tuple[Position, ...] | None
    expected: Any = None
    settings: tuple[tuple[Position, Any], ...] = ()


@dataclass(frozen=True)
class Route:
    """All expressions from a caller's ``forward`` to one activation call."""

    hops: tuple[Hop, ...]
    end: End
    again: bool
    """Whether ``torch.utils.checkpoint`` or the like runs a part of it again in backward."""

    @property
    def called(self) -> tuple[Function, ...]:
        """The function that each hop calls."""
        return (*(hop.function for hop in self.hops[1:]), self.end.function)[: len(self.hops)]

    @property
    def functions(self) -> set[Function]:
        """All functions that have to be edited."""
        return {hop.function for hop in self.hops} | {self.end.function}
