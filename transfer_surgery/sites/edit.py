"""The user's own functions, with activation calls replaced by calls of units.

Only the expressions of a `Route` change: the rest of the function, its file name, its line numbers,
globals, closure and defaults stay. A function on the way to a call is copied too, and the copy is
given its units by the one that calls it.
"""

from __future__ import annotations

import ast
import functools
import itertools
import warnings
from collections import defaultdict
from collections.abc import Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor

from transfer_surgery.activations import Activation
from transfer_surgery.sites.copies import (
    UneditableError,
    compile_function,
    copy_function,
    copy_in_wrappers,
    copy_method,
    is_unchanged,
    place_code,
)
from transfer_surgery.sites.evaluate import mangle
from transfer_surgery.sites.route import Expression, Hop, Way
from transfer_surgery.sites.scope import Caller, Scope, read
from transfer_surgery.sites.source import Function, FunctionNode, Position, find_expressions
from transfer_surgery.sites.swap import PREFIX, Swap, make_choice, make_swap
from transfer_surgery.sites.unit_calls import call_unit, prepare_names


def edit_methods(
    base: type, ways: Sequence[Way], unseen: Sequence[tuple[Expression, str]]
) -> dict[str, FunctionType]:
    """Copies of a caller's ``forward``, and of methods that it calls, which call units.

    A method that one place calls, once in a forward, is edited on its own: it has the same units
    where others call it, as ``decode`` of an autoencoder.

    Args:
        base: class of the caller.
        ways: the ways to all edited expressions, also to those that stay.
        unseen: activation calls that did not run: they stay, with a warning when they run.

    Raises:
        UneditableError: the source does not allow it.
    """
    caller = Caller(base, dict(unseen))
    calls = defaultdict[Function, set[Any]](set)
    for way in ways:
        for number, step in enumerate(way.steps[1:], 1):
            calls[step.function] |= {way.steps[:number], *(way.units if way.several else ())}
    touched = {place for way in ways if any(way.units) for place in way.places}
    entries = defaultdict[str, list[Way]](list)
    for way in ways:
        if touched.isdisjoint(way.places):
            continue
        name, start = "forward", 0
        for number, (hop, step) in enumerate(itertools.pairwise(way.steps), 1):
            if isinstance(hop, Hop) and hop.method and len(calls[step.function]) == 1:
                name, start = hop.method, number
        entries[name].append(Way(way.steps[start:], way.units))
    return {name: _edit_method(base, name, several, caller) for name, several in entries.items()}


def _edit_method(base: type, name: str, ways: list[Way], caller: Caller) -> FunctionType:
    edit = _Edit(ways, caller, entry=True)
    copy = copy_in_wrappers(getattr(base, name), edit.function, edit.apply_to)
    if copy is None:
        raise UneditableError(f"{base.__name__}.{name} is not {edit.function.qualname}")
    return copy


class _Edit:
    """The edit of one function: its new code, and the objects that the code refers to."""

    def __init__(self, ways: Sequence[Way], caller: Caller, *, entry: bool) -> None:
        self.function = ways[0].function
        node = self.function.parse()
        self.scope = Scope(ways, caller, node, entry=entry)
        node = _Editor(self.scope, node).visit(node)
        if not isinstance(node, ast.Lambda):
            prepare_names(node.body)
        names = [f"{PREFIX}{i}" for i in range(len(ways))]
        if entry:
            self._begin(node, [(n, w) for n, w in zip(names, ways, strict=True) if w.several])
        else:
            node.args.kwonlyargs += [ast.arg(name) for name in names]
            node.args.kw_defaults += [None for _ in names]
        if _reads_variables(node) and (
            self.scope.objects or not entry or any(way.several for way in ways)
        ):
            raise UneditableError(f"{self.function.qualname} looks at its own variables")
        self._compiled = compile_function(self.function, node, tuple(self.scope.objects))
        self._codes: dict[CodeType, CodeType] = {}

    def _begin(self, node: FunctionNode, ways: list[tuple[str, Way]]) -> None:
        """Where several units take turns: ``_ts_0 = iter((self.relu_0, self.relu_1))``."""
        for name, way in ways:
            if isinstance(node, ast.Lambda):
                raise UneditableError("a lambda cannot count its calls")
            units = [ast.Constant(None) if u is None else self.scope.unit(u) for u in way.units]
            turns = ast.Call(read("iter"), [ast.Tuple(units, ast.Load())], [])
            assignment = ast.Assign([ast.Name(name, ast.Store())], turns)
            node.body.insert(0, ast.copy_location(assignment, node.body[0]))

    def apply_to(self, original: FunctionType) -> FunctionType:
        """A copy of a function with the edited code; all else is the function's own."""
        code = self._code(original.__code__)
        cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
        cells |= {name: CellType(value) for name, value in self.scope.objects.items()}
        return copy_function(original, code, tuple(cells[name] for name in code.co_freevars))

    def _code(self, original: CodeType) -> CodeType:
        if original not in self._codes:
            if is_unchanged(original, self.function) is False:
                warnings.warn(
                    f"{self.function.qualname} has changed since the model was converted: "
                    "the model runs what it was then. Revert, and convert again.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._codes[original] = place_code(self._compiled, original)
        return self._codes[original]


def _reads_variables(node: FunctionNode) -> bool:
    """Whether a function may find the names that an edit adds, as ``locals()`` does."""
    for one in ast.walk(node):
        match one:
            case ast.Call(func=ast.Name(id="locals" | "eval" | "exec")):
                return True
            case ast.Call(func=ast.Name(id="vars" | "dir"), args=[]):
                return True
            case ast.Attribute(attr="f_locals"):
                return True
    return False


class _Editor(ast.NodeTransformer):
    """Replaces the expressions of an edit, the inner ones first."""

    def __init__(self, scope: Scope, root: FunctionNode) -> None:
        self.scope = scope
        self.done: dict[int, Any] = {}
        self.locals = {n.arg for n in ast.walk(root) if isinstance(n, ast.arg)}
        names = (n for n in ast.walk(root) if isinstance(n, ast.Name))
        self.locals |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        self.unseen = {
            expression.position: name
            for expression, name in scope.caller.unseen.items()
            if expression.function == scope.function
        }
        self.nodes = find_expressions(root)
        self.steps: dict[int, list[int]] = defaultdict(list)
        for i, way in enumerate(scope.ways):
            self.steps[id(self.node_at(way.steps[0].position))].append(i)

    def node_at(self, position: Position) -> Any:
        if position not in self.nodes:
            raise UneditableError(f"line {position.line} has no expression for it")
        return self.nodes[position][0]

    def edited_at(self, position: Position) -> Any:
        return self.done[id(self.node_at(position))]

    def visit(self, node: Any) -> Any:
        key = id(node)
        new: Any = super().visit(node)
        if key in self.steps:
            new = ast.copy_location(self._replace(new, self.steps[key]), node)
        if self.unseen and isinstance(node, ast.Call):
            name = self.unseen.get(Position.of(node))
            if name is not None:
                missed = self.scope.missed(new, name, "in a branch that did not run")
                new = ast.copy_location(missed, node)
        self.done[key] = new
        return new

    def _replace(self, node: Any, numbers: list[int]) -> Any:
        """What takes the place of an expression, given the numbers of the ways through it."""
        step = self.scope.ways[numbers[0]].steps[0]
        if isinstance(step, Hop):
            replace = self._call_method if step.is_bound else self._choose
            return replace(node, numbers)
        if step.expected is not None:
            return self._choose(node, numbers)
        if len(numbers) > 1:
            raise UneditableError("one expression is several activations")
        return call_unit(self.scope, node, numbers[0], step, self.edited_at)

    def _edit(self, numbers: Sequence[int]) -> tuple[_Edit, dict[str, ast.expr]]:
        """The edit of the function that several ways lead to, and what its copy is given."""
        ways = [Way(way.steps[1:], way.units) for way in map(self.scope.ways.__getitem__, numbers)]
        if len({way.function for way in ways}) > 1:
            raise UneditableError("one expression calls several functions")
        given = {f"{PREFIX}{j}": self.scope.given(i) for j, i in enumerate(numbers)}
        return _Edit(ways, self.scope.caller, entry=False), given

    def _call_method(self, node: Any, numbers: list[int]) -> ast.expr:
        """A call of a copy of a base class's method, or of a property, with the units for it."""
        scope, is_property = self.scope, isinstance(node, ast.Attribute)
        edit, given = self._edit(numbers)
        name = mangle(node.attr if is_property else node.func.attr, scope.function)
        method = copy_method(edit.function, scope.caller.base, name, edit.apply_to)
        copy = scope.refer("c", method)
        keywords = [ast.keyword(*one) for one in given.items()]
        if is_property:
            return ast.Call(copy, [node.value], keywords)
        first = node.func.value.args[1:] or [scope.module()]  # of super(Net, self)
        return ast.Call(copy, [*first, *node.args], [*node.keywords, *keywords])

    def _choose(self, node: Any, numbers: list[int]) -> ast.expr:
        """What gives the copy of a function or a unit, in the place of what gives the callee."""
        scope, text = self.scope, self.scope.warning(node)
        is_fixed = isinstance(node, ast.Attribute)
        is_fixed |= isinstance(node, ast.Name) and node.id not in self.locals
        functions = defaultdict[Function, list[int]](list)
        swaps, ends = list[Swap](), list[tuple[Activation | None, bool]]()
        copies, units = list[ast.expr](), list[ast.expr]()
        for i in numbers:
            step, *rest = scope.ways[i].steps
            if isinstance(step, Hop):
                functions[rest[0].function].append(i)
                continue
            unit = scope.given(i)
            if step.is_method and isinstance(node, ast.Attribute):
                method = scope.refer("e", getattr(Tensor, node.attr))
                node = ast.Call(scope.refer("p", functools.partial), [method, node.value], [])
            ends.append(
                (None if isinstance(step.expected, tuple) else step.expected, scope.ways[i].several)
            )
            units.append(unit)
        for function, several in functions.items():
            edit, given = self._edit(several)
            swaps.append(make_swap(function, scope.caller.base, edit.apply_to))
            copies.append(ast.Dict([*map(ast.Constant, given)], [*given.values()]))
        choice = make_choice(swaps, ends, text, may_vary=not is_fixed or len(numbers) > 1)
        return ast.Call(scope.refer("s", choice), [node, *copies, *units], [])
