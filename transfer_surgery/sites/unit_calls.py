"""``self.relu_0(x)`` in the place of ``F.relu(x)``: the call of a unit as a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from transfer_surgery.sites.copies import UneditableError
from transfer_surgery.sites.route import End
from transfer_surgery.sites.scope import Scope, read
from transfer_surgery.sites.source import Position
from transfer_surgery.sites.swap import PREFIX

_FUNCTION, _UNIT = f"{PREFIX}f", f"{PREFIX}u"


def call_units(
    scope: Scope,
    node: Any,
    ends: Sequence[tuple[int, End]],
    edited_at: Callable[[Position], ast.expr],
) -> Any:
    """What takes the place of an expression that is an activation call.

    Args:
        scope: of the function that it is in.
        node: the expression.
        ends: the ways that end at it, with their numbers.
        edited_at: the expression that has taken the place of the one at a position.
    """
    result = node
    if ends[0][1].expected is not None:  # the callee has been read by then
        result = ast.Call(read(_FUNCTION), node.args, node.keywords)
    for number, (i, end) in reversed(list(enumerate(ends))):
        unit, tests = scope.given(i), list[ast.expr]()
        if end.expected is not None:
            callee: ast.expr = read(_FUNCTION)
            if number == 0:
                callee = ast.NamedExpr(ast.Name(_FUNCTION, ast.Store()), node.func)
            tests.append(ast.Compare(callee, [ast.Is()], [_expected(scope, end.expected)]))
        elif len(ends) > 1:
            raise UneditableError("one expression is several activations")
        if scope.ways[i].several:
            turn = ast.Call(read("next"), [unit, ast.Constant(None)], [])
            unit = read(_UNIT)
            turn_is = ast.NamedExpr(ast.Name(_UNIT, ast.Store()), turn)
            tests.append(ast.Compare(turn_is, [ast.IsNot()], [ast.Constant(None)]))
            if end.expected is None and None not in scope.ways[i].units:
                result = _missed(scope, i, result, node, "more often than")
        if end.settings:
            positions, values = zip(*end.settings, strict=True)
            given = ast.Tuple([edited_at(position) for position in positions], ast.Load())
            wanted = ast.Tuple([ast.Constant(value) for value in values], ast.Load())
            tests.append(ast.Compare(given, [ast.Eq()], [wanted]))
            result = _missed(scope, i, result, node, "with other settings than")
        call = _given_inputs(unit, node, end, edited_at)
        if isinstance(node, ast.AugAssign):
            if tests:
                raise UneditableError("an augmented assignment stands for several units")
            return ast.Assign([node.target], call)
        if tests:
            test = tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests)
            call = ast.IfExp(test, call, ast.copy_location(result, node))
        result = call
    return result


def _missed(scope: Scope, i: int, result: Any, node: Any, how: str) -> ast.expr:
    name = next(name for name in scope.ways[i].units if name is not None)
    return scope.missed(ast.copy_location(result, node), name.rpartition("_")[0], how)


def _given_inputs(
    unit: ast.expr, node: Any, end: End, edited_at: Callable[[Position], ast.expr]
) -> ast.expr:
    if end.inputs is None:
        return ast.Call(unit, node.args, node.keywords)
    inputs = [edited_at(position) for position in end.inputs]
    inputs = [read(one.id) if isinstance(one, ast.Name) else one for one in inputs]
    return ast.Call(unit, inputs, [])


def _expected(scope: Scope, expected: Any) -> ast.expr:
    """A torch function, or a module below the caller."""
    if not isinstance(expected, tuple):
        return scope.refer("e", expected)
    module = scope.module()
    for name in expected[1:]:
        children = ast.Attribute(module, "_modules", ast.Load())
        module = ast.Subscript(children, ast.Constant(name), ast.Load())
    return module


def prepare_names(body: list[ast.stmt]) -> None:
    """``_ts_f = _ts_u = None``: where a comprehension sets them, torch.compile reads them."""
    used = {n.target.id for one in body for n in ast.walk(one) if isinstance(n, ast.NamedExpr)}
    names: list[ast.expr] = [ast.Name(n, ast.Store()) for n in (_FUNCTION, _UNIT) if n in used]
    if names:
        body.insert(0, ast.copy_location(ast.Assign(names, ast.Constant(None)), body[0]))
