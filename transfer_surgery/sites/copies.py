"""Copies of functions with other code, in copies of the decorators around them.

A function is known by its module, its qualified name and, where it was written inside of another
one, by its source. So a copy is found again after the model was pickled.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from transfer_surgery.sites.frames import leads_to
from transfer_surgery.sites.source import Function, FunctionNode, NoSourceError, read_function


class UneditableError(Exception):
    """Redirects that do not fit into one function; the message says why."""


def compile_function(function: Function, node: FunctionNode, names: Sequence[str]) -> CodeType:
    """Compile the syntax tree of a function inside of what is around it in its file.

    Args:
        function: the function, for its name, its class and the variables that it takes from
            functions around it.
        node: its syntax tree.
        names: further variables that come from around it.
    """
    node, around = _without_surroundings(node), function.class_name
    inner: ast.stmt = ast.Expr(node) if isinstance(node, ast.Lambda) else node
    if around:  # private names have the class's
        inner = ast.ClassDef(around, [], [], [inner], [])
    body, bound = [inner], around or function.name
    if bound.isidentifier() and bound not in function.free:
        # The definition would bind its name here, and hide the global that the code may read.
        body.insert(0, ast.Global([bound]))
    outer_names = [ast.arg(name) for name in (*function.free, *names)]
    arguments = ast.arguments([], outer_names, None, [], [], None, [])
    outer = ast.FunctionDef("_outer", arguments, body, [])
    code: Any = ast.fix_missing_locations(ast.Module([outer], []))
    code = compile(code, "<edited>", "exec", function.flags, dont_inherit=True)
    for _ in ("_outer", *([around] if around else []), function.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    return code  # type: ignore[no-any-return]


def _without_surroundings(node: FunctionNode) -> FunctionNode:
    """A function without what Python evaluates where it is defined: that has been done."""
    arguments = node.args
    arguments.defaults = []
    if any(default is not None for default in arguments.kw_defaults):
        arguments.kw_defaults = [None for _ in arguments.kwonlyargs]
    rest = [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest):
        argument.annotation = None
    if not isinstance(node, ast.Lambda):
        node.decorator_list, node.returns = [], None
        if hasattr(node, "type_params"):  # from Python 3.12 on
            node.type_params = []
    return node


def place_code(code: CodeType, original: CodeType) -> CodeType:
    """Give code the file and the qualified names of the original, and so all code inside of it."""

    def place(one: CodeType) -> CodeType:
        inner = (place(c) if isinstance(c, CodeType) else c for c in one.co_consts)
        name = original.co_qualname + one.co_qualname[len(code.co_qualname) :]
        file = original.co_filename
        return one.replace(co_qualname=name, co_filename=file, co_consts=tuple(inner))

    return place(code)


def is_unchanged(code: CodeType, function: Function) -> bool | None:
    """Whether a function is still what it was; None where it has no source any more."""
    with contextlib.suppress(NoSourceError):
        return read_function(code, function.module).source == function.source
    return None


def copy_function(
    original: FunctionType, code: CodeType, closure: tuple[CellType, ...]
) -> FunctionType:
    """A function with other code and closure; all else is the original's own."""
    globals_, name, defaults = original.__globals__, original.__name__, original.__defaults__
    copy = FunctionType(code, globals_, name, defaults, closure)
    copy.__kwdefaults__ = original.__kwdefaults__
    copy.__dict__.update(vars(original))
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(copy, name, getattr(original, name))
    return copy


def copy_in_wrappers(
    function: Any, meant: Function, edit: Callable[[FunctionType], FunctionType]
) -> FunctionType | None:
    """The edited copy of a function in copies of the decorators around it; None: another one.

    Raises:
        UneditableError: a decorator does not keep the function in its closure.
    """
    if is_meant(function, meant):
        return edit(function)
    inner = getattr(function, "__wrapped__", None)
    copy = None if inner is None else copy_in_wrappers(inner, meant, edit)
    if copy is None:
        return None
    closure = getattr(function, "__closure__", None) or ()
    if not any(_content(cell) is inner for cell in closure):
        raise UneditableError(f"{meant.qualname} is not in the closure of its decorator")
    cells = tuple(CellType(copy) if _content(cell) is inner else cell for cell in closure)
    return copy_function(function, function.__code__, cells)


def _content(cell: CellType) -> Any:
    with contextlib.suppress(ValueError):  # the cell may be empty
        return cell.cell_contents


def find_functions(meant: Function, base: type, name: str | None = None) -> list[FunctionType]:
    """The functions of a class that are meant, or what its module knows under the meant name.

    Decorators of torch around one are part of what is found.

    Args:
        meant: the function.
        base: the class.
        name: look at the class's attributes of this name only.
    """
    named: Any = sys.modules.get(meant.module)
    for part in meant.qualname.split("."):
        named = getattr(named, part, None)
    held = [v for cls in base.__mro__ for n, v in vars(cls).items() if name in (None, n)]
    found = [one for value in held if (one := _outermost(value, meant))]
    return found or [one for one in [_outermost(named, meant)] if one]


def _outermost(value: Any, meant: Function) -> FunctionType | None:
    """The function in an attribute, or in a decorator around it, that leads to the one meant."""
    function = value.fget if isinstance(value, property) else value
    if isinstance(function, (classmethod, staticmethod, MethodType)):
        function = function.__func__
    for outer in _layers(function):
        inners = [inner for inner in _layers(outer) if is_meant(inner, meant)]
        if any(leads_to(outer, inner.__code__) for inner in inners):
            return outer
    return None


def _layers(function: Any) -> Iterator[FunctionType]:
    """A function and those that its decorators wrap."""
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def is_meant(function: Any, meant: Function) -> bool:
    """Whether a function is the one that was edited."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_qualname != meant.qualname:
        return False
    # Not its `__module__`: `functools.wraps` gives a decorator the one of what it wraps.
    if function.__globals__.get("__name__") != meant.module:
        return False
    # Functions inside of others, such as lambdas, may share a name.
    unchanged = "<" not in meant.qualname or is_unchanged(code, meant)
    return code.co_firstlineno == meant.first_line if unchanged is None else unchanged


def copy_method(
    meant: Function, base: type, name: str, edit: Callable[[FunctionType], FunctionType]
) -> FunctionType:
    """An edited copy of the method of this name that a class or its bases have.

    Raises:
        UneditableError: there is none, or several.
    """
    found = set(find_functions(meant, base, name))
    copy = copy_in_wrappers(found.pop(), meant, edit) if len(found) == 1 else None
    if copy is None:
        raise UneditableError(f"{meant.qualname} cannot be found by its name")
    return copy
