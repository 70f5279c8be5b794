"""The way from an owner's ``forward`` to an activation call, as expressions in the source.

While the finder's stand-in runs, the Python frames of a call tell which function made it and at
which expression. A `Route` keeps this as text and positions: what has to be edited so that the call
goes to a unit.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import operator
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from transfer_surgery.activations import (
    Call,
    Match,
    argument_names,
    may_be_activation,
    registered_name,
)
from transfer_surgery.sites.source import (
    SEEN,
    Function,
    FunctionNode,
    NoSourceError,
    Position,
    is_inside,
    read_function,
)

# With the separator: torchvision is none of torch's.
_TORCH, _HERE = (f"{Path(module).parent}{os.sep}" for module in (torch.__file__, __file__))
_MODULE_CALL = nn.Module._call_impl.__code__
_MODULE_FILE = _MODULE_CALL.co_filename
_UNKNOWN = object()
_NUMBERS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub}
_NUMBERS |= {ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}
_EFFECTS = (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_PURE = {"math", "numpy"}
"""Modules whose functions of numbers do nothing but return one."""


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
    """

    function: Function
    position: Position
    carrier: Position
    how: str


@dataclass(frozen=True)
class End:
    """The expression that becomes a call of the unit.

    Attributes:
        function: the function that it is in.
        position: of the expression.
        inputs: positions of what the unit is given; None: the arguments of the call as they are.
        expected: where the expression may call other things too, what it has to call: a torch
            function, or the names that lead from the owner to a module.
    """

    function: Function
    position: Position
    inputs: tuple[Position, ...] | None
    expected: Any = None


@dataclass(frozen=True)
class Route:
    """All expressions from an owner's ``forward`` to one activation call."""

    hops: tuple[Hop, ...]
    end: End
    again: bool
    """Whether ``torch.utils.checkpoint`` runs a part of it again in backward."""

    @property
    def functions(self) -> set[Function]:
        """All functions that have to be edited."""
        return {hop.function for hop in self.hops} | {self.end.function}


def call_frames(owner: nn.Module) -> list[FrameType]:
    """The frames from the call of ``owner`` to the running one, the outermost first.

    The innermost frames in which torch only passes the call on are left out.
    """
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _MODULE_CALL:
            if frame.f_locals["self"] is owner:
                break
            frames = []  # the inside of a module that the owner calls is not the owner's code
        elif code.co_filename == _MODULE_FILE or code.co_filename.startswith(_HERE):
            pass
        elif frames or not _is_torch(code) or isinstance(_first_local(frame), nn.Module):
            frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


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
    again = any(f.f_code.co_filename == torch.utils.checkpoint.__file__ for f in frames)
    forward = getattr(type(owner), "forward", None)
    users = list(itertools.dropwhile(lambda frame: _is_torch(frame.f_code), frames))
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
            place = _Place(function, frames[last], _first_local(frames[start]) is owner)
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


def leads_to(value: Any, code: CodeType) -> bool:
    """Whether a call of a value runs this code, at once or inside of torch's own decorators."""
    if code_of(value) is code:
        return True
    inner = getattr(value, "__wrapped__", None)
    wrapper = code_of(value)
    return bool(inner and wrapper and _is_torch(wrapper)) and leads_to(inner, code)


def code_of(value: Any) -> CodeType | None:
    """The code that runs when something is called: a function, a method, an object, a partial."""
    if isinstance(value, functools.partial):
        return code_of(value.func)
    if isinstance(value, MethodType):
        return code_of(value.__func__)
    if isinstance(value, FunctionType):
        return value.__code__
    call = inspect.getattr_static(type(value), "__call__", None)
    return call.__code__ if isinstance(call, FunctionType) else None


def is_users(file: str) -> bool:
    """Whether a source file is neither torch's nor of this package."""
    return not file.startswith((_TORCH, _HERE))


def _is_torch(code: CodeType) -> bool:
    return code.co_filename.startswith(_TORCH)


def _first_local(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


@functools.lru_cache(maxsize=512)
def _tree(function: Function) -> FunctionNode:
    return function.parse()


@functools.lru_cache(maxsize=512)
def _index(function: Function) -> dict[Position, list[ast.AST]]:
    """The expressions of a function by their positions."""
    nodes: dict[Position, list[ast.AST]] = defaultdict(list)
    for node in ast.walk(_tree(function)):
        if isinstance(node, (ast.expr, ast.AugAssign)):
            nodes[Position.of(node)].append(node)
    return nodes


class _Place:
    """The expression that a frame is evaluating."""

    def __init__(self, function: Function, frame: FrameType, is_method: bool) -> None:
        self.function, self.frame, self.is_method = function, frame, is_method
        self.node = self._node()
        self.position = Position.of(self.node)

    def _node(self) -> Any:
        code, kinds = self.frame.f_code, (ast.Call, ast.BinOp, ast.AugAssign, ast.Attribute)
        found = next(itertools.islice(code.co_positions(), self.frame.f_lasti // 2, None))
        if None in found:
            raise NoRouteError("its code was compiled without positions")
        at, index = Position(*found), _index(self.function)  # type: ignore[arg-type]
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
            following = next((i for i, f in enumerate(frames) if not _is_torch(f.f_code)), 0)
            for carrier in self._carriers(node):
                value = self.value(carrier)
                if leads_to(value, frames[following].f_code):
                    how = "argument" if carrier is not node.func else "call"
                    if how == "call" and _is_super(carrier):
                        how = "super"
                    hop = Hop(self.function, self.position, Position.of(carrier), how)
                    return hop, following, value
        name = frames[0].f_code.co_qualname
        raise NoRouteError(f"line {self.position.line} does not show that it calls {name}")

    def _carriers(self, node: ast.Call) -> Iterator[ast.expr]:
        yield node.func
        for part in (node.func, *node.args, *node.keywords):
            yield from (n for n in ast.walk(part) if isinstance(n, (ast.Name, ast.Attribute)))

    def end(
        self, called: Call | tuple[nn.Module, tuple[str, ...] | None], match: Match | None
    ) -> End:
        """The expression as one that a unit can take the place of."""
        if not isinstance(called, Call):
            return self._module_call(*called)
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
        rest = (one for one in given.values() if one not in used)
        dropped = [one for one in rest if self.value(one) is _UNKNOWN]
        if any(isinstance(part, _EFFECTS) for one in dropped for part in ast.walk(one)):
            raise NoRouteError(f"line {self.position.line} does more than give the arguments")
        positions = tuple(Position.of(one) for one in used)
        expected = None if self._is_fixed(node.func) else function
        return End(self.function, self.position, positions, expected)

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
            holder is _UNKNOWN and isinstance(func.value, (ast.Call, ast.BinOp))
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
            is_name = isinstance(self.value(func.value), (ModuleType, type))
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
            elif value is _UNKNOWN and self._is_part(part):
                self._read_formula(part, named, others)
            elif value is _UNKNOWN:
                others.append(part)

    def _is_part(self, node: Any) -> bool:
        """Whether an expression is an operation of a formula."""
        if not isinstance(node, ast.Call):
            return isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp))
        function = self.value(node.func)
        if isinstance(function, nn.Module):
            return not any(True for _ in function.parameters()) and isinstance(
                node.func, ast.Attribute
            )
        return self._known_function(node) is not None and self._is_fixed(node.func)

    def value(self, node: ast.AST) -> Any:
        """What an expression means in the frame, as far as that can be told without calls."""
        try:
            return self._evaluate(node)
        except Exception:  # whatever the user's attributes raise
            return _UNKNOWN

    def _evaluate(self, node: ast.AST) -> Any:
        frame = self.frame
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                spaces = (frame.f_locals, frame.f_globals, frame.f_builtins)
                return next(space[node.id] for space in spaces if node.id in space)
            case ast.Attribute():
                return getattr(self._evaluate(node.value), mangle(node.attr, self.function))
            case ast.Subscript():
                return self._evaluate(node.value)[self._evaluate(node.slice)]
            case ast.UnaryOp(op=ast.USub()):
                return -self._evaluate(node.operand)
            case ast.Call(func=ast.Name(id="getattr"), args=[held, name], keywords=[]):
                return getattr(self._evaluate(held), self._evaluate(name))
            case ast.Call(func=ast.Name(id="super"), args=[], keywords=[]):
                return super(frame.f_locals["__class__"], _first_local(frame))
            case ast.Call(func=ast.Name(id="super"), args=[base, one], keywords=[]):
                return super(self._evaluate(base), self._evaluate(one))
            case ast.Call(func=ast.Name(id="type"), args=[one], keywords=[]):
                return type(self._evaluate(one))
            case ast.BinOp() if type(node.op) in _NUMBERS:
                return _NUMBERS[type(node.op)](*map(self._number, (node.left, node.right)))
            case ast.Call(keywords=[]):
                function = self._evaluate(node.func)
                if {getattr(function, "__module__", ""), type(function).__module__} & _PURE:
                    return function(*map(self._number, node.args))
        raise NotImplementedError

    def _number(self, node: ast.expr) -> int | float:
        value = self._evaluate(node)
        if not isinstance(value, (int, float)):
            raise NotImplementedError
        return value


def mangle(name: str, function: Function) -> str:
    """A name as Python reads it in the class of a function: private ones get the class's name."""
    owner = function.class_name
    if owner and name.startswith("__") and not name.endswith("__"):
        return f"_{owner.lstrip('_')}{name}"
    return name


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and (
        isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    )


def unseen_calls(
    functions: Iterable[Function], seen: Collection[Expression]
) -> tuple[tuple[Expression, str], ...]:
    """Activation calls that are written in functions, but did not run; with the activation's name.

    Only what the source shows: a function of torch under its name, or a method of a tensor.
    """
    found = []
    for function in functions:
        space = vars(sys.modules.get(function.module, object))
        own = _own_argument(function)
        for position, nodes in _index(function).items():
            expression = Expression(function, position)
            for node in nodes:
                # What is called on the module itself is a module or a method, no tensor's.
                if isinstance(node, ast.Call) and not (own and _root(node.func) == own):
                    name = registered_name(_read_name(node.func, space))
                    if name is not None and name != "clamp" and expression not in seen:
                        found.append((expression, name))
    return tuple(found)


def shows_activation(function: FunctionType) -> bool:
    """Whether the source of a function shows an activation call."""
    try:
        read = read_function(function.__code__, function.__globals__.get("__name__", ""))
    except NoSourceError:
        return False
    return bool(unseen_calls([read], ()))


def _own_argument(function: Function) -> str | None:
    """What a method calls its first argument."""
    node = _tree(function)
    decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
    arguments = [*node.args.posonlyargs, *node.args.args]
    is_method = function.class_name and "staticmethod" not in decorators
    return arguments[0].arg if is_method and arguments else None


def _root(node: ast.expr) -> str | None:
    """``self`` of ``self.block.relu``; None of a single name."""
    if not isinstance(node, ast.Attribute):
        return None
    return node.value.id if isinstance(node.value, ast.Name) else _root(node.value)


def _read_name(node: ast.expr, space: Mapping[str, Any]) -> Any:
    """What a dotted name means in a module; a method of a tensor where it begins otherwise."""
    if isinstance(node, ast.Name):
        return space.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    holder = _read_name(node.value, space)
    return getattr(Tensor if holder is None else holder, node.attr, None)
