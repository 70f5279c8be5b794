"""From the frames of a running activation call to its route in the source or in a graph."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from transfer_surgery.activations import Call, Match
from transfer_surgery.sites.activation_expression import ActivationExpression
from transfer_surgery.sites.evaluate import Evaluator
from transfer_surgery.sites.expression import is_super, running_position
from transfer_surgery.sites.frames import (
    CHECKPOINT,
    code_of,
    find_own_function,
    is_torch,
    leads_to,
)
from transfer_surgery.sites.graph import GraphRoute, find_node
from transfer_surgery.sites.route import Expression, Hop, NoRouteError, Route
from transfer_surgery.sites.source import (
    SEEN,
    Function,
    NoSourceError,
    Position,
    expressions_of,
    is_inside,
    read_function,
)
from transfer_surgery.sites.tensor_facts import is_known, is_live

Called = Call | tuple[nn.Module, tuple[str, ...] | None]
"""An activation call; or an activation module, and the names that lead to it from the caller, None
where it is not below the caller."""


def names_below(caller: str, path: str) -> tuple[str, ...] | None:
    """The names that lead from one path in a model to another one; None where that is not below."""
    names, above = path.split("."), caller.split(".") if caller else []
    return tuple(names[len(above) :]) if names[: len(above)] == above else None


IN_FUNCTION = (
    "it runs in an autograd.Function, whose backward would be that of the original activation; "
    "call the activation outside of it"
)


class Found(NamedTuple):
    """Where a call can be edited, or why it cannot; and its own expression, where that is known."""

    route: Route | GraphRoute | None
    why: str | None
    expression: Expression | None


def find_route(
    caller: nn.Module, frames: list[FrameType], called: Called, match: Match | None
) -> Found:
    """How a call can be edited in the source or in a graph, found while it is running.

    Args:
        caller: the module whose code makes the call.
        frames: as `call_frames` gives them.
        called: what is called.
        match: the formula that the call completes, if any.
    """
    try:
        if isinstance(caller, fx.GraphModule):
            return Found(find_node(caller, frames, called, match), None, None)
        route, expression = _find_in_source(caller, frames, called, match)
    except NoRouteError as error:
        why = str(error) if find_own_function(frames) is None else IN_FUNCTION
        return Found(None, why, error.expression)
    return Found(route, None, expression)


def _find_in_source(
    caller: nn.Module, frames: list[FrameType], called: Called, match: Match | None
) -> tuple[Route, Expression]:
    """How the source leads from the caller's ``forward`` to the call, and the call itself."""
    again = any(f.f_code.co_filename == CHECKPOINT for f in frames)
    again |= find_own_function(frames) is not None
    forward = getattr(type(caller), "forward", None)
    held = inspect.getattr_static(type(caller), "forward", None)
    if isinstance(held, (staticmethod, classmethod)):
        raise NoRouteError("its forward is not given the module")
    users = list(itertools.dropwhile(lambda frame: is_torch(frame.f_code), frames))
    frames = next((f for f in (users, frames) if f and leads_to(forward, f[0].f_code)), [])
    if not frames:
        raise NoRouteError("its forward is not what calls it")
    expression = None
    try:
        hops: list[Hop] = []
        start, outer = 0, frames[0].f_code
        while True:
            function = _read(outer, frames[start])
            # Comprehensions and functions written inside of this one are edited with it, but where
            # the same code runs again, as in a recursion, that is another call.
            later = range(start + 1, len(frames))
            stop = next((i for i in later if frames[i].f_code is outer), len(frames))
            last = max(i for i in range(start, stop) if is_inside(frames[i].f_code, outer))
            rest = frames[last + 1 :]
            found = _find_maker(function, frames[start : last + 1], rest)
            if found is None:
                place = ActivationExpression(function, frames[last], caller)
                if not rest:
                    expression = Expression(function, place.position)
                    return Route(tuple(hops), place.end(called, match), again), expression
                found = place.hop(rest)
            hop, following, callee = found
            hops, start = [*hops, hop], last + 1 + following
            code, outer = code_of(callee), frames[start].f_code
            outer = code if code is not None and is_inside(outer, code) else outer
            if isinstance(callee, FunctionType):  # it may have no name by which to find it again
                SEEN[_read(outer, frames[start])] = callee
    except (NoSourceError, NoRouteError) as error:
        unknown = NoRouteError(str(error))
        unknown.expression = expression
        raise unknown from error


def _find_maker(
    function: Function, frames: Sequence[FrameType], rest: Sequence[FrameType]
) -> tuple[Hop, int, Any] | None:
    """The call that made a generator or a closure which now runs.

    Args:
        function: the function that has made it.
        frames: the frames of that function and of comprehensions in it.
        rest: the frames of what it calls.

    Returns:
        The call, which of the further frames is that of what it made, and the function that it
        calls; None where none of them was made so.

    Raises:
        NoRouteError: it is a generator, and there is no such call, or there are several.
    """
    is_generator = bool(rest and rest[0].f_code.co_flags & inspect.CO_GENERATOR)
    at = 0 if is_generator else next((i for i, f in enumerate(rest) if _is_new_closure(f)), None)
    if at is None:
        return None
    made, value = rest[at].f_code, Evaluator(function, frames[0]).value
    nodes = itertools.chain.from_iterable(expressions_of(function).values())
    makes = leads_to if is_generator else _holds
    calls = [n for n in nodes if isinstance(n, ast.Call) and makes(value(n.func), made)]
    if len(calls) > 1:  # of several the one that is running: ``sum(generator(x))``
        running = running_position(frames[-1])
        calls = [call for call in calls if running.contains(Position.of(call))]
    if len(calls) != 1:
        if not is_generator:
            return None
        raise NoRouteError(f"{function.qualname} does not show where {made.co_name} begins")
    func = calls[0].func
    bound = is_super(func)
    return Hop(function, Position.of(calls[0] if bound else func), bound), at, value(func)


def _is_new_closure(frame: FrameType) -> bool:
    """Whether a frame runs a closure that this forward has made: it holds what that computes.

    torch.compile cannot copy such a closure; what makes it can be copied.
    """
    cells = (frame.f_locals.get(name) for name in frame.f_code.co_freevars)
    return any(isinstance(x, Tensor) and is_known(x) and is_live(x) for x in cells)


def _holds(value: Any, made: CodeType) -> bool:
    """Whether code was written inside of a function."""
    code = code_of(value)
    return code is not None and code is not made and is_inside(made, code)


def _read(code: CodeType, frame: FrameType) -> Function:
    return read_function(code, frame.f_globals.get("__name__", ""))
