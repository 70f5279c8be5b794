"""The user's own functions, with activation calls replaced by calls of units.

Only the expressions of a `Route` change: the rest of the function, its file name, its line numbers,
globals, closure and defaults stay. A function on the way to a call is copied too, and the copy is
given its units by the one that calls it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from transfer_surgery.sites.route import End, Expression, Hop, Route, leads_to
from transfer_surgery.sites.source import SEEN, Function, FunctionNode, Position

_PREFIX = "_ts_"


@dataclass(frozen=True)
class Redirect:
    """One expression of an owner and the units that its calls go to, in turn.

    Attributes:
        route: where the expression is.
        units: names of the owner's units; None for a call that stays as it is.
    """

    route: Route
    units: tuple[str | None, ...]


class UneditableError(Exception):
    """Redirects that do not fit into one function; the message says why."""


def edit_forward(
    forward: FunctionType,
    base: type,
    redirects: Sequence[Redirect],
    unseen: Sequence[tuple[Expression, str]],
) -> FunctionType:
    """A copy of an owner's ``forward`` that calls units.

    Args:
        forward: the function itself.
        base: the class whose ``forward`` it is.
        redirects: the expressions to replace.
        unseen: activation calls that did not run: they stay, with a warning when they run.

    Raises:
        UneditableError: the source does not allow it.
    """
    ways = [_Way(r.route.hops, r.route.end, r.units) for r in redirects]
    edit = _Edit(ways, _Caller(base, dict(unseen)), entry=True)
    copy: FunctionType | None = _in_wrappers(forward, edit)
    if copy is None:
        raise UneditableError(f"{base.__name__}.forward is not {edit.function.qualname}")
    return copy


@dataclass(frozen=True)
class _Way:
    """What is left of a route in one function, and what is given at its end."""

    hops: tuple[Hop, ...]
    end: End
    units: tuple[str | None, ...]

    @property
    def function(self) -> Function:
        return self.hops[0].function if self.hops else self.end.function

    @property
    def several(self) -> bool:
        return len(self.units) > 1


class _Caller(NamedTuple):
    """What all functions of a caller share: its own class, and calls that did not run."""

    base: type
    unseen: Mapping[Expression, str]


class _Edit:
    """The edit of one function: its new syntax tree, and the objects that the tree refers to."""

    def __init__(self, ways: Sequence[_Way], caller: _Caller, *, entry: bool) -> None:
        self.function, self.ways, self.caller = ways[0].function, ways, caller
        self.objects: dict[str, Any] = {}
        node = self.function.parse()
        self.first = _first_argument(node)
        self.entry = entry
        self.node: Any = _Editor(self, node).visit(node)
        self.node.decorator_list = []
        names = [f"{_PREFIX}{i}" for i in range(len(ways))]
        self._initialise()
        if entry:
            self._begin([(n, way) for n, way in zip(names, ways, strict=True) if way.several])
        else:
            self.node.args.kwonlyargs += [ast.arg(name) for name in names]
            self.node.args.kw_defaults += [None for _ in names]

    def _initialise(self) -> None:
        """``_ts_f = _ts_u = None``: where a comprehension sets them, torch.compile reads them."""
        used = {n.target.id for n in ast.walk(self.node) if isinstance(n, ast.NamedExpr)}
        own = [f"{_PREFIX}{kind}" for kind in "fu" if f"{_PREFIX}{kind}" in used]
        if own and not isinstance(self.node, ast.Lambda):
            names: list[ast.expr] = [ast.Name(name, ast.Store()) for name in own]
            assignment = ast.Assign(names, ast.Constant(None))
            self.node.body.insert(0, ast.copy_location(assignment, self.node.body[0]))

    def _begin(self, ways: list[tuple[str, _Way]]) -> None:
        """Where several units take turns: ``_ts_0 = iter((self.relu_0, self.relu_1))``."""
        if ways and isinstance(self.node, ast.Lambda):
            raise UneditableError("a lambda cannot count its calls")
        for name, way in ways:
            units = [ast.Constant(None) if u is None else self.unit(u) for u in way.units]
            turns = ast.Call(_read("iter"), [ast.Tuple(units, ast.Load())], [])
            assignment = ast.Assign([ast.Name(name, ast.Store())], turns)
            self.node.body.insert(0, ast.copy_location(assignment, self.node.body[0]))

    def unit(self, name: str) -> ast.expr:
        """``self.relu_0``, whatever the function calls its first argument."""
        return ast.Attribute(self.owner(), name, ast.Load())

    def owner(self) -> ast.expr:
        if self.first is None:
            raise UneditableError(f"{self.function.qualname} has no name for the module")
        return ast.parse(self.first, mode="eval").body

    def given(self, i: int) -> ast.expr:
        """The unit of a way, or the iterator over its units."""
        (unit, *_), several = self.ways[i].units, self.ways[i].several
        return self.unit(str(unit)) if self.entry and not several else _read(f"{_PREFIX}{i}")

    def refer(self, kind: str, value: Any) -> ast.expr:
        """A name in the code for an object that is not the user's."""
        name = f"{_PREFIX}{kind}{len(self.objects)}"
        self.objects[name] = value
        return _read(name)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as the edited class
    def code(self, file: str) -> CodeType:
        """Compile the function inside a class and a function, for private and closure names."""
        node, name = self.node, self.function.class_name
        inner: ast.stmt = ast.Expr(node) if isinstance(node, ast.Lambda) else node
        if name:
            inner = ast.ClassDef(name, [], [], [inner], [])
        names = [ast.arg(name) for name in (*self.function.free, *self.objects)]
        free = ast.arguments([], names, None, [], [], None, [])
        outer = ast.FunctionDef("_outer", free, [inner], [])
        module = ast.fix_missing_locations(ast.Module([outer], []))
        code: CodeType = compile(module, file, "exec", self.function.flags, dont_inherit=True)
        while code.co_name != self.function.name:
            code = next(c for c in code.co_consts if isinstance(c, CodeType))
        return _rename(code, len(code.co_qualname), self.function.qualname)

    def apply_to(self, original: FunctionType) -> FunctionType:
        """A copy of a function with the edited code; all else is the function's own."""
        code = self.code(original.__code__.co_filename)
        cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
        cells |= {name: CellType(value) for name, value in self.objects.items()}
        if missing := set(code.co_freevars) - set(cells):
            raise UneditableError(
                f"{self.function.qualname} reads {min(missing)} in a way of its own"
            )
        return _like(original, code, tuple(cells[name] for name in code.co_freevars))


def _rename(code: CodeType, length: int, qualname: str) -> CodeType:
    """Give code and all code inside of it the qualified names that they have in the file."""
    inner = [_rename(c, length, qualname) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.replace(co_qualname=qualname + code.co_qualname[length:], co_consts=tuple(inner))


def _like(original: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    """A function with other code; all else is the original's own."""
    globals_, name, defaults = original.__globals__, original.__name__, original.__defaults__
    copy = FunctionType(code, globals_, name, defaults, closure)
    copy.__kwdefaults__ = original.__kwdefaults__
    copy.__dict__.update(vars(original))
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(copy, name, getattr(original, name))
    return copy


class _Editor(ast.NodeTransformer):
    """Replaces the expressions of an edit, the inner ones first."""

    def __init__(self, edit: _Edit, root: FunctionNode) -> None:
        self.edit = edit
        self.done: dict[int, Any] = {}
        self.unseen = {
            expression.position: name
            for expression, name in edit.caller.unseen.items()
            if expression.function == edit.function
        }
        self.nodes: dict[Position, list[ast.AST]] = defaultdict(list)
        for node in ast.walk(root):
            if isinstance(node, (ast.expr, ast.AugAssign)):
                self.nodes[Position.of(node)].append(node)
        self.ends: dict[int, list[tuple[int, End]]] = defaultdict(list)
        self.hops: dict[int, list[tuple[int, Hop]]] = defaultdict(list)
        for i, way in enumerate(edit.ways):
            if way.hops:
                hop = way.hops[0]
                at = hop.carrier if hop.how == "argument" else hop.position
                self.hops[id(self.node_at(at))].append((i, hop))
            else:
                self.ends[id(self.node_at(way.end.position))].append((i, way.end))

    def node_at(self, position: Position) -> Any:
        return self.nodes[position][0]

    def visit(self, node: Any) -> Any:
        key = id(node)
        new: Any = super().visit(node)
        if key in self.ends:
            new = ast.copy_location(self._unit_calls(new, self.ends[key]), node)
        if key in self.hops:
            new = ast.copy_location(self._call(new, self.hops[key]), node)
        if self.unseen and isinstance(node, ast.Call):
            name = self.unseen.get(Position.of(node))
            if name is not None:
                new = ast.copy_location(
                    self._missed(new, name, "in a branch that did not run"), node
                )
        self.done[key] = new
        return new

    def _missed(self, node: Any, name: str, how: str) -> ast.expr:
        """The same value, with a warning."""
        function = self.edit.function
        text = (
            f"{self.edit.caller.base.__name__} calls {name} ({function.qualname}, line "
            f"{node.lineno - function.first_line + 1} of it) {how} when the model was converted: "
            "it has no gates. Revert, and convert in the state and with an example_input that do "
            "this."
        )
        return ast.Call(self.edit.refer("m", missed), [node, ast.Constant(text)], [])

    def _unit_calls(self, node: Any, ends: list[tuple[int, End]]) -> Any:
        """``self.relu_0(x)`` in the place of ``F.relu(x)``; with a condition where there is one."""
        original = node
        if ends[0][1].expected is not None:
            original = ast.Call(_read(f"{_PREFIX}f"), node.args, node.keywords)
        for number, (i, end) in reversed(list(enumerate(ends))):
            unit = self.edit.given(i)
            tests: list[ast.expr] = []
            if end.expected is not None:
                function: ast.expr = _read(f"{_PREFIX}f")
                if number == 0:
                    function = ast.NamedExpr(ast.Name(f"{_PREFIX}f", ast.Store()), node.func)
                tests.append(ast.Compare(function, [ast.Is()], [self._expected(end.expected)]))
            elif len(ends) > 1:
                raise UneditableError("one expression is several activations")
            if self.edit.ways[i].several:
                following = ast.Call(_read("next"), [unit, ast.Constant(None)], [])
                turn = ast.NamedExpr(ast.Name(f"{_PREFIX}u", ast.Store()), following)
                tests.append(ast.Compare(turn, [ast.IsNot()], [ast.Constant(None)]))
                unit = _read(f"{_PREFIX}u")
                units = [name for name in self.edit.ways[i].units if name is not None]
                if end.expected is None and len(units) == len(self.edit.ways[i].units):
                    name = units[0].rpartition("_")[0]
                    original = ast.copy_location(original, node)
                    original = self._missed(original, name, "more often than")
            call = self._given_inputs(unit, node, end)
            if isinstance(node, ast.AugAssign):
                if tests:
                    raise UneditableError("an augmented assignment stands for several units")
                return ast.Assign([node.target], call)
            if tests:
                test = tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests)
                call = ast.IfExp(test, call, ast.copy_location(original, node))
            original = call
        return original

    def _given_inputs(self, unit: ast.expr, node: Any, end: End) -> ast.expr:
        if end.inputs is None:
            return ast.Call(unit, node.args, node.keywords)
        inputs = [self.done[id(self.node_at(at))] for at in end.inputs]
        inputs = [_read(one.id) if isinstance(one, ast.Name) else one for one in inputs]
        return ast.Call(unit, inputs, [])

    def _expected(self, expected: Any) -> ast.expr:
        """A torch function, or a module below the owner."""
        if not isinstance(expected, tuple):
            return self.edit.refer("e", expected)
        module = self.edit.owner()
        for name in expected[1:]:
            children = ast.Attribute(module, "_modules", ast.Load())
            module = ast.Subscript(children, ast.Constant(name), ast.Load())
        return module

    def _call(self, node: Any, hops: list[tuple[int, Hop]]) -> ast.expr:
        """A call of a copy of the function, which is given the units for it."""
        edit, hop = self.edit, hops[0][1]
        ways = [edit.ways[i] for i, _ in hops]
        ways = [_Way(way.hops[1:], way.end, way.units) for way in ways]
        given = [ast.keyword(f"{_PREFIX}{j}", edit.given(i)) for j, (i, _) in enumerate(hops)]
        if hop.how in ("super", "property"):
            copied = edit.refer("c", _copy_of_method(ways, edit.caller))
            if hop.how == "property":
                return ast.Call(copied, [node.value], given)
            return ast.Call(copied, [edit.owner(), *node.args], [*node.keywords, *given])
        swap = edit.refer("s", _swap(ways, edit.caller))
        if hop.how == "call":
            return ast.Call(ast.Call(swap, [node.func], []), node.args, [*node.keywords, *given])
        partial = edit.refer("p", functools.partial)
        return ast.Call(partial, [ast.Call(swap, [node], [])], given)


def _swap(ways: Sequence[_Way], caller: _Caller) -> Callable[[Any], Any]:
    """From what the code calls to the same with its units, looked up each time as the user's is."""
    edit = _Edit(ways, caller, entry=False)
    known = SEEN.get(edit.function) or find_function(edit.function, caller.base)
    copy: Any = None if known is None else _in_wrappers(known, edit)
    copies: WeakKeyDictionary[FunctionType, FunctionType] = WeakKeyDictionary()

    # Without closure and defaults all functions with the same code are the same.
    code = None if known is None or edit.function.free or known.__defaults__ else known.__code__

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def copy_of(function: FunctionType) -> Any:
        if function not in copies:
            edited = _in_wrappers(function, edit)
            if edited is None:
                return functools.partial(_unchanged, function)
            copies[function] = edited
        return copies[function]

    def swap(value: Any) -> Any:
        if isinstance(value, FunctionType):
            is_known = value is known or (code is not None and value.__code__ is code)
            return copy if is_known else copy_of(value)
        if isinstance(value, MethodType):
            function = value.__func__
            changed = copy if function is known else copy_of(function)
            return functools.partial(changed, value.__self__)
        if isinstance(value, functools.partial):
            return functools.partial(swap(value.func), *value.args, **value.keywords)
        return functools.partial(copy_of(type(value).__call__), value)

    return swap


def _in_wrappers(function: Any, edit: _Edit) -> Any:
    """The edited copy of a function, in copies of the decorators around it; None: another one."""
    if is_meant(function, edit.function):
        return edit.apply_to(function)
    inner = getattr(function, "__wrapped__", None)
    copy = None if inner is None else _in_wrappers(inner, edit)
    if copy is None:
        return None
    cells = tuple(
        CellType(copy) if cell.cell_contents is inner else cell for cell in function.__closure__
    )
    return _like(function, function.__code__, cells)


def find_function(meant: Function, base: type) -> Any:
    """The function of a class, or what its module knows under its name; None where it is neither.

    Decorators of torch around it are part of what is found.
    """
    named: Any = sys.modules.get(meant.module)
    for name in meant.qualname.split("."):
        named = getattr(named, name, None)
    for value in (*(v for cls in base.__mro__ for v in vars(cls).values()), named):
        function = value.fget if isinstance(value, property) else value
        function = getattr(function, "__func__", function)
        while isinstance(function, FunctionType):
            inner: Any = inspect.unwrap(function)
            if is_meant(inner, meant) and leads_to(function, inner.__code__):
                return function
            function = getattr(function, "__wrapped__", None)
    return None


def is_meant(function: Any, meant: Function) -> bool:
    """Whether a function is the one that was edited; lines count where names do not tell."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_qualname != meant.qualname:
        return False
    local = "<" in meant.qualname
    return function.__module__ == meant.module and (
        not local or code.co_firstlineno == meant.first_line
    )


def missed(value: Any, text: str) -> Any:
    """Pass a value on, with a warning: it comes from an activation without gates."""
    if isinstance(value, Tensor) and not torch.compiler.is_compiling():
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return value


def _unchanged(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Something else is called than at the conversion: it gets no units."""
    warnings.warn(
        f"{getattr(function, '__qualname__', function)} is called where another function was when "
        "the model was converted: its activations have no gates. Revert, and convert again.",
        RuntimeWarning,
        stacklevel=3,
    )
    return function(*args, **{k: v for k, v in kwargs.items() if not k.startswith(_PREFIX)})


def _copy_of_method(ways: Sequence[_Way], caller: _Caller) -> FunctionType:
    edit = _Edit(ways, caller, entry=False)
    function = find_function(edit.function, caller.base)
    if function is None:
        raise UneditableError(f"{edit.function.qualname} cannot be found by its name")
    copy: FunctionType = _in_wrappers(function, edit)
    return copy


def _first_argument(node: FunctionNode) -> str | None:
    """The first argument in the function's words; None where it has none, or changes it."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    first = arguments[0] if arguments else node.args.vararg
    if first is None:
        return None
    others = (n for n in ast.walk(node) if n is not first)
    if any(
        (isinstance(n, ast.arg) and n.arg == first.arg)
        or (isinstance(n, ast.Name) and n.id == first.arg and not isinstance(n.ctx, ast.Load))
        for n in others
    ):
        return None
    return first.arg if arguments else f"{first.arg}[0]"


def _read(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())
