"""Code that asks for the very class of a module: that of a converted caller is another one."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from types import FunctionType, ModuleType, UnionType
from typing import Any, TypeGuard

from torch import nn

from transfer_surgery.sites.frames import is_torch, names_in
from transfer_surgery.sites.source import NoSourceError, expressions_of, read_function, tree_of


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


def asked_names(model: nn.Module, names: Collection[str]) -> set[str]:
    """Of some names of classes, those that a model's forward asks for.

    As ``isinstance(x, nn.ReLU)``, ``case nn.ReLU():`` and ``type(x).__name__ == "ReLU"`` do.
    """
    held: dict[str, set[str]] = defaultdict(set)
    for module in model.modules():
        for cls in (module, *type(module).__mro__):
            for name, value in vars(cls).items():
                held[name] |= _names_of_types(value)
    asked: set[str] = set()
    for _, function in _reachable(list(dict.fromkeys(type(m) for m in model.modules()))):
        words = names_in(function.__code__)
        space = function.__globals__
        known = {word: {word} | held[word] | _names_of_types(space.get(word)) for word in words}
        if not asked.issuperset(set().union(*known.values()) & set(names)):
            asked.update(*(known.get(word, {word}) for word in _asked_words(function)))
    return asked & set(names)


def _names_of_types(value: Any) -> set[str]:
    """The names of a class, or of the classes in a container."""
    # Not isinstance: it would ask an object of the user's, which may raise anything.
    if type(value) is UnionType:
        value = value.__args__
    several = value if type(value) in (tuple, list, set, frozenset, dict) else (value,)
    return {one.__name__ for one in several if issubclass(type(one), type)}


def _asked_words(function: FunctionType) -> set[str]:
    """The names and words by which a function asks for classes; all, where it has no source."""
    try:
        tree = tree_of(read_function(function.__code__, function.__globals__.get("__name__", "")))
    except NoSourceError:
        return names_in(function.__code__)
    words = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, asked]):
                words |= _names_in_tree(asked)
            case ast.MatchClass(cls=asked):
                words |= _names_in_tree(asked)
            case ast.Compare() | ast.Match() if any(map(_is_name_of_class, ast.walk(node))):
                words |= _names_in_tree(node)
            case (
                ast.Subscript(slice=key) | ast.Call(func=ast.Attribute(attr="get"), args=[key, *_])
            ):
                if any(map(_is_name_of_class, ast.walk(key))):
                    words |= names_in(function.__code__)
    return words


def _is_name_of_class(node: ast.AST) -> bool:
    """``type(x)``, ``x.__class__`` or ``x._get_name()``, maybe in a larger expression."""
    is_class = isinstance(node, ast.expr) and _is_class(node)
    return is_class or (isinstance(node, ast.Attribute) and node.attr == "_get_name")


def _reachable(classes: list[type[nn.Module]]) -> list[tuple[type[nn.Module], FunctionType]]:
    """The functions that a forward may call, each with the class that has it or leads to it."""
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
    packages = {base.__module__.partition(".")[0] for cls in classes for base in cls.__mro__}
    found = dict.fromkeys(methods["forward"] + methods["__call__"])
    todo = list(found)
    for cls, function in todo:  # grows while it is read
        names, space = names_in(function.__code__), function.__globals__
        spaces = [space, *(vars(one) for one in map(space.get, names) if _is_module(one))]
        values = [held[name] for held in spaces for name in names & held.keys()]
        helpers = [one for one in values if isinstance(one, FunctionType)]
        called = [(cls, one) for one in helpers if _package(one) in packages - {"torch"}]
        called += [one for name in names & methods.keys() for one in methods[name]]
        todo += [one for one in dict.fromkeys(called) if one not in found]
        found |= dict.fromkeys(called)
    return todo


def _is_module(value: Any) -> TypeGuard[ModuleType]:
    return isinstance(value, ModuleType)


def _package(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__", "")).partition(".")[0]


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
    """The names and words in an expression, and the last parts of dotted names."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    words = (node.value for node in nodes if isinstance(node, ast.Constant))
    names |= {word for word in words if isinstance(word, str)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _names_in_tables(function: FunctionType) -> set[str]:
    """The names that a function uses, and those of classes that are keys of dictionaries there."""
    names = names_in(function.__code__)
    tables = [function.__globals__.get(name) for name in names]
    keys = [key for table in tables if isinstance(table, dict) for key in table]
    return names | {key.__name__ for key in keys if isinstance(key, type)}
