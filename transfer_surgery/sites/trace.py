"""From the frames of a running activation call to its `Route` in the source."""

from __future__ import annotations

import itertools
from types import FrameType, FunctionType

from torch import nn

from transfer_surgery.activations import Call, Match
from transfer_surgery.sites.expression import RunningExpression
from transfer_surgery.sites.frames import CHECKPOINT, first_local, is_torch, leads_to
from transfer_surgery.sites.route import Expression, Hop, NoRouteError, Route
from transfer_surgery.sites.source import SEEN, NoSourceError, is_inside, read_function


def find_route(
    owner: nn.Module,
    frames: list[FrameType],
    called: Call | tuple[nn.Module, tuple[str, ...] | None],
    match: Match | None = None,
) -> Route:
    """How the source leads from the owner's ``forward`` to a call while that is running.

    Args:
        owner: the module whose code makes the call.
        frames: as `call_frames` gives them.
        called: the activation call; or the activation module and the names that lead to it from
            the owner, None where it is not below the owner.
        match: the formula that the call completes, if any.

    Raises:
        NoRouteError: the call cannot be edited in the source.
    """
    again = any(f.f_code.co_filename == CHECKPOINT for f in frames)
    forward = getattr(type(owner), "forward", None)
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
            function = read_function(outer, frames[start].f_globals.get("__name__", ""))
            # Comprehensions and functions written inside of this one are edited with it, but where
            # the same code runs again, as in a recursion, that is another call.
            later = range(start + 1, len(frames))
            stop = next((i for i in later if frames[i].f_code is outer), len(frames))
            last = max(i for i in range(start, stop) if is_inside(frames[i].f_code, outer))
            place = RunningExpression(function, frames[last], first_local(frames[start]) is owner)
            if last == len(frames) - 1:
                expression = Expression(function, place.position)
                return Route(tuple(hops), place.end(called, match), again)
            hop, following, callee = place.hop(frames[last + 1 :])
            hops.append(hop)
            start = last + 1 + following
            if isinstance(callee, FunctionType):
                code = frames[start].f_code
                SEEN[read_function(code, frames[start].f_globals.get("__name__", ""))] = callee
    except (NoSourceError, NoRouteError) as error:
        unknown = NoRouteError(str(error))
        unknown.expression = expression
        raise unknown from error
