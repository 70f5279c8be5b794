"""The expression that a frame is evaluating, and which function it calls."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from types import FrameType, MethodType
from typing import Any

from torch import nn

from transfer_surgery.sites.evaluate import UNKNOWN, Evaluator, mangle
from transfer_surgery.sites.frames import code_of, find_own_function, is_torch, leads_to
from transfer_surgery.sites.route import Hop, NoRouteError
from transfer_surgery.sites.source import Function, Position, expressions_of

OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare, ast.AugAssign)


class RunningExpression:
    """The expression that a frame is evaluating."""

    def __init__(self, function: Function, frame: FrameType, caller: nn.Module) -> None:
        self.function, self.frame, self.caller = function, frame, caller
        self.value = Evaluator(function, frame).value
        self.node = self._node()
        self.position = Position.of(self.node)

    def _node(self) -> Any:
        kinds = (ast.Attribute, *OPERATIONS)
        at, index = running_position(self.frame), expressions_of(self.function)
        nodes = [node for node in index.get(at, ()) if isinstance(node, kinds)]
        if not nodes:  # Python gives the call of a method the line of the method's name
            end = at.end_line, at.end_column
            nodes = [
                node
                for position, several in index.items()
                for node in several
                if isinstance(node, ast.Call) and (position.end_line, position.end_column) == end
            ]
        if not nodes:
            raise NoRouteError(f"line {at.line} has no expression for it")
        return nodes[0]

    def hop(self, frames: list[FrameType]) -> tuple[Hop, int, Any]:
        """The call of the next function, which of the further frames is its, and the function."""
        node = self.node
        if isinstance(node, ast.Attribute):
            holder = inspect.getattr_static(type(self.value(node.value)), node.attr, None)
            if isinstance(holder, property) and code_of(holder.fget) is frames[0].f_code:
                return Hop(self.function, self.position, True), 0, None
        if isinstance(node, ast.Call):
            # Of the user's functions the next one: what is between is torch's, such as checkpoint.
            following = next((i for i, f in enumerate(frames) if not is_torch(f.f_code)), 0)
            if following == find_own_function(frames) and following + 1 < len(frames):
                following += 1  # a checkpoint of the user's own, which is given what it runs
            order = dict.fromkeys((following, 0))
            for at, carrier in itertools.product(order, self._carriers(node)):
                value = self.value(carrier)
                method = self._method(carrier, value)
                if leads_to(value, frames[at].f_code) and (at == following or method):
                    bound = carrier is node.func and is_super(carrier)
                    position = Position.of(node if bound else carrier)
                    return Hop(self.function, position, bound, method), at, value
            # torch.compile cannot copy a closure that is made while it reads the code.
            closures = self.function.free or frames[0].f_code.co_freevars
            if following == 0 and not closures and self._is_unknown(node.func):
                return Hop(self.function, Position.of(node.func)), 0, None
        name = frames[0].f_code.co_qualname
        raise NoRouteError(f"line {self.position.line} does not show that it calls {name}")

    def _method(self, carrier: ast.expr, value: Any) -> str | None:
        """The name of the caller's method that an expression looks up; None of anything else."""
        if not isinstance(carrier, ast.Attribute) or is_super(carrier):
            return None
        if not isinstance(value, MethodType):
            return None
        name = mangle(carrier.attr, self.function)
        held = inspect.getattr_static(type(self.caller), name, None)
        is_own = value.__self__ is self.caller and value.__func__ is held
        return name if is_own and name not in vars(self.caller) else None

    def _carriers(self, node: ast.Call) -> Iterator[ast.expr]:
        """The called expression, and all that the call is given, but for what is called in it."""
        yield node.func
        inner = [n for part in (node.func, *node.args, *node.keywords) for n in ast.walk(part)]
        names = [n for n in inner if isinstance(n, (ast.Name, ast.Attribute))]
        used = [n.value for n in names if isinstance(n, ast.Attribute)]
        used += [n.func for n in inner if isinstance(n, ast.Call)]
        yield from (name for name in names if name not in used)

    def _is_unknown(self, func: ast.expr) -> bool:
        """Whether it gives a function that is not known before, and no object that calls others."""
        is_object = isinstance(func, ast.Call) and isinstance(self.value(func.func), type)
        return self.value(func) is UNKNOWN and not is_object


def running_position(frame: FrameType) -> Position:
    """Where the expression stands that a frame is evaluating."""
    code = frame.f_code
    found = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
    if None in found:
        raise NoRouteError("its code was compiled without positions")
    return Position(*found)  # type: ignore[arg-type]


def is_super(node: ast.expr) -> bool:
    """``super().step``."""
    return isinstance(node, ast.Attribute) and (
        isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    )
