"""What an expression means in a running frame, as far as that can be told without the user's code.

Names, attributes, items and arithmetic of numbers are evaluated; calls of the user's are not.
"""

from __future__ import annotations

import ast
import operator
from types import FrameType
from typing import Any

from transfer_surgery.sites.frames import first_local
from transfer_surgery.sites.source import Function

UNKNOWN = object()
_NUMBERS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub}
_NUMBERS |= {ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}
_PURE = {"math", "numpy"}
"""Modules whose functions of numbers do nothing but return one."""


class Evaluator:
    """Evaluates expressions of a function in the frame that runs it."""

    def __init__(self, function: Function, frame: FrameType) -> None:
        self.function, self.frame = function, frame

    def value(self, node: ast.AST) -> Any:
        """The value of an expression; `UNKNOWN` where it cannot be told."""
        try:
            return self._evaluate(node)
        except Exception:  # whatever the user's attributes raise
            return UNKNOWN

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
                return -self._number(node.operand)
            case ast.Call(func=ast.Name(id="getattr"), args=[held, name], keywords=[]):
                return getattr(self._evaluate(held), self._evaluate(name))
            case ast.Call(func=ast.Name(id="super"), args=[], keywords=[]):
                return super(frame.f_locals["__class__"], first_local(frame))
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
