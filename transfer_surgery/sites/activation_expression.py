"""The expression of a running activation call: how a unit can take its place."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from numbers import Real
from types import ModuleType
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch._ops import OpOverloadPacket

from transfer_surgery.activations import (
    Call,
    Match,
    argument_names,
    may_be_activation,
    registered_activations,
    registered_name,
)
from transfer_surgery.sites.evaluate import UNKNOWN
from transfer_surgery.sites.expression import OPERATIONS, RunningExpression
from transfer_surgery.sites.frames import first_local, is_torch, without_partials
from transfer_surgery.sites.route import End, NoRouteError
from transfer_surgery.sites.source import Position


class ActivationExpression(RunningExpression):
    """An expression that calls an activation."""

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
        carrier = self._carrier_of(lambda value: without_partials(value) is called)
        if carrier is self.node.func and (getattr(carrier, "attr", None),) == names:
            return End(self.function, self.position, None)
        if names is None:
            raise NoRouteError(f"line {self.position.line} may call other modules too")
        return End(self.function, Position.of(carrier), None, names)

    def _function_call(self, call: Call) -> End:
        if (inputs := self._fixed_inputs(call)) is not None:
            return End(self.function, self.position, inputs)
        if call.written is None:
            raise NoRouteError("it is called in the code of transfer_surgery itself")
        name = call.written.name
        carrier = self._carrier_of(lambda value: registered_name(without_partials(value)) == name)
        position, is_method = Position.of(carrier), self._is_method(carrier)
        return End(self.function, position, None, call.written, is_method)

    def _fixed_inputs(self, call: Call) -> tuple[Position, ...] | None:
        """Where the unit's inputs stand in a call that is this activation whenever it runs."""
        function = self._known_function(self.node)
        if function is None or not self._is_fixed(self.node.func):
            return None
        given = {k.arg: k.value for k in self.node.keywords}
        names = ("input", *argument_names(function))
        given |= dict(zip(names, self._arguments(self.node), strict=False))
        used = [given.pop(name, None) for name in ("input", *call.activation.operands)]
        given.pop("inplace", None)
        if any(one is None or isinstance(one, ast.Starred) for one in used):
            return None
        is_fixed = all(isinstance(one, ast.Constant) for one in given.values())
        return tuple(map(Position.of, used)) if is_fixed else None

    def _carrier_of(self, is_called: Callable[[Any], bool]) -> ast.expr:
        """The expression that gives what is called: in a call before its brackets or in them."""
        if isinstance(self.node, ast.Call):
            func = self.node.func
            found = [one for one in self._carriers(self.node) if is_called(self._meaning(one))]
            if func in found or (self._is_unknown(func) and self._is_direct(is_called)):
                return func
            if len(found) == 1:
                return found[0]
        raise NoRouteError(f"line {self.position.line} does not show what it calls")

    def _is_direct(self, is_called: Callable[[Any], bool]) -> bool:
        """Whether it is the callee itself that is called, and not something that the callee has."""
        frame, called = sys._getframe(), None
        while frame is not self.frame and frame.f_back:
            called = frame if is_torch(frame.f_code) else called
            frame = frame.f_back
        function = called and called.f_globals.get(called.f_code.co_name)
        return called is None or is_called(function) or is_called(first_local(called))

    def _meaning(self, node: ast.expr) -> Any:
        """What an expression gives; a method of a tensor as a function."""
        return getattr(Tensor, node.attr) if self._is_method(node) else self.value(node)

    def _known_function(self, node: Any) -> Any:
        """The torch function that a call expression calls, if activations or formulas have it."""
        function = self._meaning(node.func) if isinstance(node, ast.Call) else None
        return function if may_be_activation(function) else None

    def _is_method(self, func: ast.expr) -> TypeGuard[ast.Attribute]:
        """Whether it is a method of a tensor: of a named one, or of the result of something."""
        if not isinstance(func, ast.Attribute) or not hasattr(Tensor, func.attr):
            return False
        holder = self.value(func.value)
        return isinstance(holder, Tensor) or (
            holder is UNKNOWN and isinstance(func.value, OPERATIONS)
        )

    def _arguments(self, node: ast.Call) -> list[ast.expr]:
        """The positional arguments, a method's own tensor included."""
        func = node.func
        return [func.value, *node.args] if self._is_method(func) else node.args

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
        numbers = dict[Position, float]()
        self._read_formula(self.node, named, others, numbers)
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
        given = tuple(numbers.items())
        return End(self.function, self.position, tuple(positions), numbers=given)

    def _read_formula(
        self,
        node: Any,
        named: dict[int, ast.expr],
        others: list[ast.expr],
        numbers: dict[Position, float],
    ) -> None:
        """Collect what a formula is made of: named tensors, numbers, and other expressions."""
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
                parts = [*self._arguments(node), *(k.value for k in node.keywords)]
            case _:
                raise NoRouteError(f"line {self.position.line} does not show the formula")
        for part in parts:
            value = self.value(part)
            if isinstance(value, Tensor):
                named.setdefault(id(value), part)
            elif value is UNKNOWN and self._is_part(part):
                self._read_formula(part, named, others, numbers)
            elif value is UNKNOWN:
                others.append(part)
            elif isinstance(value, Real) and not isinstance(part, ast.Constant):
                numbers[Position.of(part)] = float(value)  # numpy's, too

    def _is_part(self, node: Any) -> bool:
        """Whether an expression is an operation of a formula."""
        if not isinstance(node, ast.Call):
            return isinstance(node, OPERATIONS)
        function = self.value(node.func)
        if isinstance(function, nn.Module):
            return not any(True for _ in function.parameters()) and isinstance(
                node.func, ast.Attribute
            )
        return self._known_function(node) is not None and self._is_fixed(node.func)
