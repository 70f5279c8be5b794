"""Calls that the source shows, but that were not seen when the model was examined."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.activations import registered_name
from transfer_surgery.sites.frames import code_of, is_users
from transfer_surgery.sites.route import Expression
from transfer_surgery.sites.source import (
    Function,
    NoSourceError,
    Position,
    expressions_of,
    read_function,
    tree_of,
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
        for node in itertools.chain.from_iterable(expressions_of(function).values()):
            # What is called on the module itself is a module or a method, no tensor's.
            if isinstance(node, ast.Call) and not (own and _root(node.func) == own):
                name = registered_name(_read_name(node.func, space))
                places = [Expression(function, Position.of(one)) for one in (node, node.func)]
                if name is not None and name != "clamp" and not any(p in seen for p in places):
                    found.append((places[0], name))
    return tuple(found)


def written_calls(model: nn.Module, names: Collection[str], seen: Collection[Expression]) -> str:
    """Where the files of a model's classes have calls of activations that were not seen to run."""
    classes = dict.fromkeys(cls for m in model.modules() for cls in type(m).__mro__)
    spaces = [vars(sys.modules.get(cls.__module__, cls)) for cls in classes]
    values = [value for space in (*spaces, *map(vars, classes)) for value in space.values()]
    functions = map(_function_of, values)
    found = dict.fromkeys(one for one in functions if isinstance(one, FunctionType))
    places = set[str]()
    for function in found:
        if is_users(function.__code__.co_filename):
            for expression, name in _calls_in(function, seen):
                if name in names:
                    file = Path(function.__code__.co_filename).name
                    places.add(f"{file}:{expression.position.line}")
    return f" (see {', '.join(sorted(places))})" if places else ""


def _function_of(value: Any) -> Any:
    """The function in a method; other values, which may not even be hashable, as they are."""
    is_method = isinstance(value, (MethodType, classmethod, staticmethod))
    return value.__func__ if is_method else value


def scripted_functions(module: nn.Module) -> list[str]:
    """TorchScript functions under a name that a module's code uses: nothing sees their calls."""
    forward = getattr(type(module), "forward", None)
    code, space = code_of(forward), getattr(forward, "__globals__", {})
    names = () if code is None else code.co_names
    return [name for name in names if isinstance(space.get(name), torch.jit.ScriptFunction)]


def shows_activation(function: FunctionType) -> bool:
    """Whether the source of a function shows an activation call."""
    return bool(_calls_in(function, ()))


def _calls_in(
    function: FunctionType, seen: Collection[Expression]
) -> tuple[tuple[Expression, str], ...]:
    try:
        read = read_function(function.__code__, function.__globals__.get("__name__", ""))
    except NoSourceError:
        return ()
    return unseen_calls([read], seen)


def _own_argument(function: Function) -> str | None:
    """What a method calls its first argument."""
    node = tree_of(function)
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
    try:
        return getattr(Tensor if holder is None else holder, node.attr, None)
    except Exception:  # whatever the user's attributes raise
        return None
