"""From the frames of a running activation call to its route in the source or in a graph."""

from __future__ import annotations

import inspect
import itertools
from types import FrameType, FunctionType
from typing import Any

from torch import fx, nn

from transfer_surgery.activations import Call, Match
from transfer_surgery.sites.expression import RunningExpression, find_creation
from transfer_surgery.sites.frames import CHECKPOINT, first_local, is_torch, leads_to
from transfer_surgery.sites.graph import GraphRoute, find_node
from transfer_surgery.sites.route import Expression, Hop, NoRouteError, Route
from transfer_surgery.sites.source import SEEN, Function, NoSourceError, is_inside, read_function

Called = Call | tuple[nn.Module, tuple[str, ...] | None]
"""An activation call; or an activation module, and the names that lead to it from the caller, None
where it is not below the caller."""


def names_below(caller: str, path: str) -> tuple[str, ...] | None:
    """The names that lead from one path in a model to another one; None where that is not below."""
    names, above = path.split("."), caller.split(".") if caller else []
    return tuple(names[len(above) :]) if names[: len(above)] == above else None


def find_route(
    caller: nn.Module, frames: list[FrameType], called: Called, match: Match | None
) -> Route | GraphRoute:
    """How a call can be edited in the source or in a graph, found while it is running.

    Args:
        caller: the module whose code makes the call.
        frames: as `call_frames` gives them.
        called: what is called.
        match: the formula that the call completes, if any.

    Raises:
        NoRouteError: the call cannot be edited.
    """
    if isinstance(caller, fx.GraphModule):
        return find_node(caller, frames, called, match)
    return _find_in_source(caller, frames, called, match)


def _find_in_source(
    caller: nn.Module, frames: list[FrameType], called: Called, match: Match | None
) -> Route:
    """How the source leads from the caller's ``forward`` to the call."""
    again = any(f.f_code.co_filename == CHECKPOINT for f in frames)
    forward = getattr(type(caller), "forward", None)
    users = list(itertools.dropwhile(lambda frame: is_torch(frame.f_code), frames))
    frames = next((f for f in (users, frames) if f and leads_to(forward, f[0].f_code)), [])
    if not frames:
        raise NoRouteError("its forward is not what calls it")
    expression = None
    try:
        hops: list[Hop] = []
        start = 0
        while True:
            outer = frames[start].f_code
            function = _read(frames[start])
            # Comprehensions and functions written inside of this one are edited with it, but where
            # the same code runs again, as in a recursion, that is another call.
            later = range(start + 1, len(frames))
            stop = next((i for i in later if frames[i].f_code is outer), len(frames))
            last = max(i for i in range(start, stop) if is_inside(frames[i].f_code, outer))
            rest = frames[last + 1 :]
            if rest and rest[0].f_code.co_flags & inspect.CO_GENERATOR:
                hop, callee = find_creation(function, frames[start : last + 1], rest[0].f_code)
                hops, start = [*hops, hop], last + 1
                _note(callee, rest[0])
                continue
            place = RunningExpression(function, frames[last], first_local(frames[start]) is caller)
            if last == len(frames) - 1:
                expression = Expression(function, place.position)
                return Route(tuple(hops), place.end(called, match), again)
            hop, following, callee = place.hop(rest)
            hops, start = [*hops, hop], last + 1 + following
            _note(callee, frames[start])
    except (NoSourceError, NoRouteError) as error:
        unknown = NoRouteError(str(error))
        unknown.expression = expression
        raise unknown from error


def _read(frame: FrameType) -> Function:
    return read_function(frame.f_code, frame.f_globals.get("__name__", ""))


def _note(callee: Any, frame: FrameType) -> None:
    """Remember the function that a frame runs: it may have no name by which to find it again."""
    if isinstance(callee, FunctionType):
        SEEN[_read(frame)] = callee
