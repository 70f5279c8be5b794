"""``self.relu_0(x)`` in the place of ``F.relu(x)``: the call of a unit as a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from transfer_surgery.sites.copies import UneditableError
from transfer_surgery.sites.route import End
from transfer_surgery.sites.scope import Scope, read
from transfer_surgery.sites.source import Position
from transfer_surgery.sites.swap import PREFIX

_UNIT = f"{PREFIX}u"


def call_unit(
    scope: Scope, node: Any, i: int, end: End, edited_at: Callable[[Position], ast.expr]
) -> Any:
    """What takes the place of an expression that is an activation call.

    Args:
        scope: of the function that it is in.
        node: the expression.
        i: the number of the way that ends at it.
        end: the end of that way.
        edited_at: the expression that has taken the place of the one at a position.
    """
    way, unit = scope.ways[i], scope.given(i)
    if not any(way.units):
        return node
    if not way.several:
        call = _given_inputs(unit, node, end, edited_at)
        if isinstance(node, ast.AugAssign):
            assert isinstance(node.target, ast.Name)  # as all formulas are that are read
            target = ast.copy_location(read(node.target.id), node)
            value = ast.copy_location(ast.BinOp(target, node.op, node.value), node)
            call = _if_as_before(scope, value, way.units[0], call, end, edited_at)
            return ast.Assign([node.target], call)
        return _if_as_before(scope, node, way.units[0], call, end, edited_at)
    if isinstance(node, ast.AugAssign):
        raise UneditableError("an augmented assignment stands for several units")
    result = node
    if None not in way.units:
        name = str(way.units[0]).rpartition("_")[0]
        result = scope.missed(node, name, "more often than")
    turn = ast.Call(read("next"), [unit, ast.Constant(None)], [])
    named = ast.NamedExpr(ast.Name(_UNIT, ast.Store()), turn)
    test = ast.Compare(named, [ast.IsNot()], [ast.Constant(None)])
    call = _given_inputs(read(_UNIT), node, end, edited_at)
    call = _if_as_before(scope, node, way.units[0], call, end, edited_at)
    return ast.IfExp(test, call, ast.copy_location(result, node))


def _if_as_before(
    scope: Scope,
    node: Any,
    unit: str | None,
    call: ast.expr,
    end: End,
    edited_at: Callable[[Position], ast.expr],
) -> ast.expr:
    """The call of a unit while the numbers of a formula are those of the conversion."""
    if not end.numbers:
        return call
    tests: list[ast.expr] = [
        ast.Compare(edited_at(position), [ast.Eq()], [ast.Constant(number)])
        for position, number in end.numbers
    ]
    test = tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests)
    missed = scope.missed(node, str(unit).rpartition("_")[0], "with other settings than")
    return ast.IfExp(test, call, ast.copy_location(missed, node))


def _given_inputs(
    unit: ast.expr, node: Any, end: End, edited_at: Callable[[Position], ast.expr]
) -> ast.expr:
    if end.inputs is None:
        return ast.Call(unit, node.args, node.keywords)
    inputs = [edited_at(position) for position in end.inputs]
    inputs = [read(one.id) if isinstance(one, ast.Name) else one for one in inputs]
    return ast.Call(unit, inputs, [])


def prepare_names(body: list[ast.stmt]) -> None:
    """``_ts_u = None``: where a comprehension sets it, torch.compile reads it."""
    nodes = (node for one in body for node in ast.walk(one))
    if any(isinstance(n, ast.NamedExpr) and n.target.id == _UNIT for n in nodes):
        assignment = ast.Assign([ast.Name(_UNIT, ast.Store())], ast.Constant(None))
        body.insert(0, ast.copy_location(assignment, body[0]))
