"""Code that asks for the very class of a module: that of a converted caller is another one."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from transfer_surgery.sites.frames import is_torch, names_in
from transfer_surgery.sites.source import NoSourceError, expressions_of, read_function


def asked_classes(model: nn.Module) -> dict[type[nn.Module], str]:
    """The classes of a model's modules that its forward asks for, and the method that does so.

    As ``type(x) is Block``, ``table[type(x)]`` and ``super(type(self), self)`` do.
    """
    classes = dict.fromkeys(type(module) for module in model.modules())
    asked: dict[type[nn.Module], str] = {}
    for cls, function in _reachable(list(classes)):
        for names in _questions(function):
            found = [one for one in classes if one.__name__ in names] if names else [cls]
            asked |= dict.fromkeys(found, function.__qualname__)
    return asked


def _reachable(classes: list[type[nn.Module]]) -> Iterator[tuple[type[nn.Module], FunctionType]]:
    """The methods that a forward may call, each with the class that has it."""
    methods = defaultdict[str, list[tuple[type[nn.Module], FunctionType]]](list)
    for cls in classes:
        for base in cls.__mro__:
            for name, value in vars(base).items():
                # Not getattr with a default: an object of the user's may raise anything.
                if isinstance(value, (classmethod, staticmethod)):
                    value = value.__func__
                function = value.fget if isinstance(value, property) else value
                if isinstance(function, FunctionType) and not is_torch(function.__code__):
                    methods[name].append((cls, function))
    names = ["forward", "__call__"]
    for name in names:  # grows while it is read
        for _, function in methods[name]:
            used = names_in(function.__code__) & methods.keys()
            names += [one for one in used if one not in names]
    return ((cls, function) for name in names for cls, function in methods[name])


def _questions(function: FunctionType) -> Iterator[set[str]]:
    """The names of what is asked for; none where it is the class of the module itself."""
    if not names_in(function.__code__) & {"type", "__class__"}:
        return
    try:
        read = read_function(function.__code__, function.__globals__.get("__name__", ""))
    except NoSourceError:
        return
    for node in (node for several in expressions_of(read).values() for node in several):
        match node:
            case ast.Compare() if any(map(_is_class, (node.left, *node.comparators))):
                yield _names_in_tree(node) or {""}
            case ast.Subscript() if _is_class(node.slice):
                yield _names_in_tables(function)
            case ast.Call(func=ast.Attribute(attr="get"), args=[key, *_]) if _is_class(key):
                yield _names_in_tables(function)
            case ast.Call(func=ast.Name(id="super"), args=[cls, _]) if _is_class(cls):
                yield set()


def _is_class(node: ast.expr) -> bool:
    """``type(x)`` or ``x.__class__``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1
    return isinstance(node, ast.Attribute) and node.attr == "__class__"


def _names_in_tree(tree: ast.AST) -> set[str]:
    """The names in an expression, and the last parts of dotted ones."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _names_in_tables(function: FunctionType) -> set[str]:
    """The names that a function uses, and those of classes that are keys of dictionaries there."""
    names = names_in(function.__code__)
    tables = [function.__globals__.get(name) for name in names]
    keys = [key for table in tables if isinstance(table, dict) for key in table]
    return names | {key.__name__ for key in keys if isinstance(key, type)}
