"""Whether a module's code computes an activation and does nothing else.

Such a module can be replaced by a unit. One that counts its calls, draws random numbers, looks at
its training flag or at values, or calls what is not known has to run: it is itself the caller of
the activation in it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from transfer_surgery.activations import may_be_activation
from transfer_surgery.sites.evaluate import UNKNOWN
from transfer_surgery.sites.frames import code_of, is_torch
from transfer_surgery.sites.source import NoSourceError, read_function, tree_of

_PACKAGE = str(Path(__file__).parents[1])
_SETTINGS = (bool, int, float, str, type(None))
_CONSTANT = ("math", "numpy", "torch")


def is_plain(module: nn.Module) -> bool:
    """Whether a module's ``forward`` only computes, from one input and from settings."""
    cls = type(module)
    code = code_of(cls.forward)
    if cls.__call__ is not nn.Module.__call__ or "forward" in vars(module):
        return False
    if code is not None and (is_torch(code) or code.co_filename.startswith(_PACKAGE)):
        return True
    function: Any = cls.forward
    return isinstance(function, FunctionType) and _Reader(function, module, 2).is_plain()


class _Reader:
    """Reads a function and those that it calls.

    Args:
        function: the function.
        module: the module that it belongs to.
        arguments: how many it has to have; None: any number.
        within: the code whose calls led to it.
    """

    def __init__(
        self,
        function: FunctionType,
        module: nn.Module,
        arguments: int | None = None,
        within: frozenset[CodeType] = frozenset(),
    ) -> None:
        self.function, self.module, self.arguments = function, module, arguments
        self.within = within | {function.__code__}
        self.space = dict(function.__globals__)
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # nothing is in it yet
                self.space[name] = cell.cell_contents

    def is_plain(self, is_method: bool = True) -> bool:
        """Whether it only computes; the first argument of a method is the module."""
        try:
            name = self.function.__globals__.get("__name__", "")
            node = tree_of(read_function(self.function.__code__, name))
        except NoSourceError:
            return False
        others = (node.args.vararg, node.args.kwarg, *node.args.kwonlyargs, *node.args.posonlyargs)
        names = [argument.arg for argument in node.args.args]
        if any(others) or (isinstance(node, ast.FunctionDef) and node.decorator_list):
            return False
        if len(names) <= is_method or self.arguments not in (None, len(names)):
            return False
        if is_method:
            self.space[names.pop(0)] = self.module
        # What is computed may depend on settings, but not on the input's values.
        self.tensors, self.settings = {names[0]}, set(names[1:])
        body = node.body if isinstance(node.body, list) else [ast.Return(node.body)]
        return all(map(self._is_plain_statement, body))

    def _is_plain_statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Return(value=ast.expr() as value):
                return self._computes(value)
            case ast.Assign(targets=[ast.Name(id=name)]):
                self.tensors.add(name)
                return self._computes(node.value)
            case ast.If():
                parts = (*node.body, *node.orelse)
                return self._is_setting(node.test) and all(map(self._is_plain_statement, parts))
            case ast.Expr(value=ast.Constant()):
                return True
        return False

    def _computes(self, node: ast.expr) -> bool:
        """Whether an expression does nothing but compute its value."""
        match node:
            case ast.Name(id=name) if name in self.tensors:
                return True
            case ast.BinOp():
                return self._computes(node.left) and self._computes(node.right)
            case ast.UnaryOp():
                return self._computes(node.operand)
            case ast.Compare():
                return all(map(self._computes, (node.left, *node.comparators)))
            case ast.IfExp():
                return self._is_setting(node.test) and all(
                    map(self._computes, (node.body, node.orelse))
                )
            case ast.Call():
                given = (*node.args, *(keyword.value for keyword in node.keywords))
                return self._is_known(node.func) and all(map(self._computes, given))
        return self._is_setting(node)

    def _is_setting(self, node: ast.expr) -> bool:
        """Whether an expression is a number, a switch or a word that stays."""
        match node:
            case ast.UnaryOp(op=ast.Not()):
                return self._is_setting(node.operand)
            case ast.Name(id=name) if name in self.settings:
                return True
        return isinstance(self._value(node), _SETTINGS)

    def _is_known(self, callee: ast.expr) -> bool:
        """Whether what is called is a function of torch that computes, or is plain itself."""
        function = self._value(callee)
        if function is UNKNOWN and isinstance(callee, ast.Attribute):
            method = getattr(Tensor, callee.attr, None)
            return self._computes(callee.value) and may_be_activation(method)
        return self._is_plain_callable(function)

    def _is_plain_callable(self, function: Any) -> bool:
        if isinstance(function, functools.partial):
            fixed = (*function.args, *function.keywords.values())
            is_fixed = all(isinstance(value, _SETTINGS) for value in fixed)
            return is_fixed and self._is_plain_callable(function.func)
        if may_be_activation(function) or getattr(function, "__module__", "") == "math":
            return True
        if isinstance(function, MethodType) and function.__self__ is self.module:
            method: Any = function.__func__
            return isinstance(method, FunctionType) and self._reads(method, is_method=True)
        return isinstance(function, FunctionType) and self._reads(function, is_method=False)

    def _reads(self, function: FunctionType, is_method: bool) -> bool:
        """Whether a function that is called is plain; one that calls itself is not."""
        if function.__code__ in self.within:
            return False
        return _Reader(function, self.module, within=self.within).is_plain(is_method)

    def _value(self, node: ast.expr) -> Any:
        """The value of a constant or of a dotted name that leads to no tensor of the function."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() if node.id not in self.tensors | self.settings:
                value = self.space.get(node.id, UNKNOWN)
                return UNKNOWN if isinstance(value, _SETTINGS) else value  # it may be set anew
            case ast.Attribute() if node.attr != "training":
                holder = self._value(node.value)
                held = inspect.getattr_static(type(holder), node.attr, None)
                if isinstance(held, property) or not (
                    holder is self.module or isinstance(holder, ModuleType | type)
                ):
                    return UNKNOWN
                value = getattr(holder, node.attr, UNKNOWN)
                # What the module is set to is followed. What others hold may be set anew.
                stays = holder is self.module or getattr(holder, "__name__", "") in _CONSTANT
                return value if stays or not isinstance(value, _SETTINGS) else UNKNOWN
        return UNKNOWN
