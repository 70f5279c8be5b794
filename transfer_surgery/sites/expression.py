"""The expression that a frame is evaluating: which function it calls, or which activation it is."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from types import FrameType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverloadPacket

from transfer_surgery.activations import (
    Call,
    Match,
    argument_names,
    may_be_activation,
    registered_activations,
)
from transfer_surgery.sites.evaluate import UNKNOWN, Evaluator, mangle
from transfer_surgery.sites.frames import code_of, find_own_function, is_torch, leads_to
from transfer_surgery.sites.route import End, Hop, NoRouteError
from transfer_surgery.sites.source import Function, Position, expressions_of

_SETTINGS = (bool, int, float, str, type(None))
_OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare, ast.AugAssign)


class RunningExpression:
    """The expression that a frame is evaluating."""

    def __init__(
        self, function: Function, frame: FrameType, caller: nn.Module, is_method: bool
    ) -> None:
        self.function, self.frame, self.is_method = function, frame, is_method
        self.caller = caller
        self.value = Evaluator(function, frame).value
        self.node = self._node()
        self.position = Position.of(self.node)

    def _node(self) -> Any:
        kinds = (ast.Attribute, *_OPERATIONS)
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
                return Hop(self.function, self.position, self.position, "property"), 0, None
        if isinstance(node, ast.Call):
            # Of the user's functions the next one: what is between is torch's, such as checkpoint.
            following = next((i for i, f in enumerate(frames) if not is_torch(f.f_code)), 0)
            if following == find_own_function(frames) and following + 1 < len(frames):
                following += 1  # a checkpoint of the user's own, which is given what it runs
            for carrier in self._carriers(node):
                value = self.value(carrier)
                if leads_to(value, frames[following].f_code):
                    how = "argument" if carrier is not node.func else "call"
                    if how == "call" and is_super(carrier):
                        how = "super"
                    at, method = Position.of(carrier), self._method(carrier, value)
                    return Hop(self.function, self.position, at, how, method), following, value
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

    def end(
        self, called: Call | tuple[nn.Module, tuple[str, ...] | None], match: Match | None
    ) -> End:
        """The expression as one that a unit can take the place of."""
        if not isinstance(called, Call):
            return self._module_call(*called)
        if called.activation.name not in registered_activations():
            raise NoRouteError("it is only listed")
        if match is not None:
            return self._formula(match)
        return self._function_call(called)

    def _module_call(self, called: nn.Module, names: tuple[str, ...] | None) -> End:
        node = self.node
        if not isinstance(node, ast.Call) or self.value(node.func) is not called:
            raise NoRouteError(f"line {self.position.line} does not show which module it calls")
        direct = isinstance(node.func, ast.Attribute) and (node.func.attr,) == names
        if names is None or not (direct or self.is_method):
            raise NoRouteError(f"line {self.position.line} may call other modules too")
        return End(self.function, self.position, None, None if direct else ("module", *names))

    def _function_call(self, call: Call) -> End:
        node = self.node
        function = self._known_function(node)
        if function is None:
            raise NoRouteError(f"line {self.position.line} does not show which function it calls")
        names = ("input", *argument_names(function))
        given = {k.arg: k.value for k in node.keywords}
        given |= dict(zip(names, self._arguments(node), strict=False))
        used = [given.get(name) for name in ("input", *call.activation.operands)]
        if any(one is None or isinstance(one, ast.Starred) for one in used) or None in given:
            raise NoRouteError(f"line {self.position.line} does not show the arguments one by one")
        rest = [one for name, one in given.items() if one not in used and name != "inplace"]
        rest = [one for one in rest if not isinstance(one, ast.Constant)]
        settings = tuple((Position.of(one), self.value(one)) for one in rest)
        if any(not isinstance(value, _SETTINGS) for _, value in settings):
            raise NoRouteError(f"line {self.position.line} computes an argument")
        positions = tuple(Position.of(one) for one in used)
        expected = None if self._is_fixed(node.func) else function
        return End(self.function, self.position, positions, expected, settings)

    def _known_function(self, node: Any) -> Any:
        """The torch function that a call expression calls, if activations or formulas have it."""
        if not isinstance(node, ast.Call):
            return None
        func: Any = node.func
        function = getattr(Tensor, func.attr, None) if self._is_method(func) else self.value(func)
        return function if may_be_activation(function) else None

    def _is_method(self, func: ast.expr) -> bool:
        """Whether it is a method of a tensor: of a named one, or of the result of something."""
        if not isinstance(func, ast.Attribute):
            return False
        holder = self.value(func.value)
        return isinstance(holder, Tensor) or (
            holder is UNKNOWN and isinstance(func.value, _OPERATIONS)
        )

    def _arguments(self, node: ast.Call) -> list[ast.expr]:
        """The positional arguments, a method's own tensor included."""
        func = node.func
        if isinstance(func, ast.Attribute) and self._is_method(func):
            return [func.value, *node.args]
        return node.args

    def _is_fixed(self, func: ast.expr) -> bool:
        """Whether an expression means the same function whenever it is evaluated."""
        if isinstance(func, ast.Attribute):
            is_name = isinstance(self.value(func.value), (ModuleType, type, OpOverloadPacket))
            return self._is_method(func) or (is_name and self._is_fixed(func.value))
        return isinstance(func, ast.Name) and func.id not in self.frame.f_locals

    def _formula(self, match: Match) -> End:
        inner = {id(record.value) for _, record in match.inner}
        named: dict[int, ast.expr] = {}
        others: list[ast.expr] = []
        self._read_formula(self.node, named, others)
        if inner & named.keys():
            raise NoRouteError("the formula is written in several statements")
        positions = []
        for value in (match.input, *match.operands):
            if id(value) in named:
                positions.append(Position.of(named[id(value)]))
            elif len(others) == 1:  # what the formula is made of, but for one expression
                positions.append(Position.of(others.pop()))
            else:
                raise NoRouteError("the input of the formula has no name")
        if others:
            raise NoRouteError("the formula has a part that may do more than give a number")
        return End(self.function, self.position, tuple(positions))

    def _read_formula(self, node: Any, named: dict[int, ast.expr], others: list[ast.expr]) -> None:
        """Collect what a formula's expression is made of: named tensors, and other expressions."""
        match node:
            case ast.BinOp():
                parts = [node.left, node.right]
            case ast.Compare():
                parts = [node.left, *node.comparators]
            case ast.UnaryOp():
                parts = [node.operand]
            case ast.AugAssign(target=ast.Name()):
                parts = [node.target, node.value]
            case ast.Call() if self._is_part(node):
                parts = self._arguments(node)
            case _:
                raise NoRouteError(f"line {self.position.line} does not show the formula")
        for part in parts:
            value = self.value(part)
            if isinstance(value, Tensor):
                named.setdefault(id(value), part)
            elif value is UNKNOWN and self._is_part(part):
                self._read_formula(part, named, others)
            elif value is UNKNOWN:
                others.append(part)

    def _is_part(self, node: Any) -> bool:
        """Whether an expression is an operation of a formula."""
        if not isinstance(node, ast.Call):
            return isinstance(node, _OPERATIONS)
        function = self.value(node.func)
        if isinstance(function, nn.Module):
            return not any(True for _ in function.parameters()) and isinstance(
                node.func, ast.Attribute
            )
        return self._known_function(node) is not None and self._is_fixed(node.func)


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
