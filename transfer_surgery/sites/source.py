"""From a code object that runs to its function in the source: the text, checked against the code.

The source file is compiled again, and the function is taken only if the result is the very code
that runs. So a file that was changed after its import is noticed, and never edited in the wrong
place.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag,
    __future__.all_feature_names,
    0,
)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class NoSourceError(Exception):
    """The source of a function cannot be had; the message says why."""


class Position(NamedTuple):
    """Where an expression stands in its file, as `ast` counts lines and columns."""

    line: int
    end_line: int
    column: int
    end_column: int

    @classmethod
    def of(cls, node: Any) -> Position:
        """The position of a node of a syntax tree."""
        return cls(node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)

    def contains(self, other: Position) -> bool:
        """Whether another position is inside of this one, or the same."""
        starts = (self.line, self.column) <= (other.line, other.column)
        return starts and (other.end_line, other.end_column) <= (self.end_line, self.end_column)


@dataclass(frozen=True)
class Function:
    """A function's own text: all that is needed to compile it again, without its file.

    Attributes:
        module: name of the module that defines it.
        qualname: its qualified name there.
        first_line: where it starts in its file, decorators included.
        source: its lines as they are in the file; of a lambda, the expression alone.
        column: where that text starts in its first line.
        free: names of the variables that it takes from functions around it.
        flags: the `from __future__` imports of its file, as `compile` takes them.
    """

    module: str
    qualname: str
    first_line: int
    source: str
    column: int
    free: tuple[str, ...]
    flags: int

    @property
    def name(self) -> str:
        return self.qualname.rpartition(".")[2]

    @property
    def class_name(self) -> str:
        """Name of the class that it is written in; empty where there is none."""
        *_, around, _ = ("", "<locals>", *self.qualname.split("."))
        return "" if around == "<locals>" else around

    def parse(self) -> FunctionNode:
        """The syntax tree of the function, with the positions that it has in its file."""
        # A line in front lets indented text be parsed: a block for a def, a bracket for a lambda.
        is_lambda = self.name == "<lambda>"
        start = "(\n" + " " * self.column if is_lambda else "if 1:\n" if self.column else "\n"
        tree = ast.parse(f"{start}{self.source}" + "\n)" * is_lambda)
        ast.increment_lineno(tree, self.first_line - 2)
        return next(n for n in ast.walk(tree) if isinstance(n, FunctionNode))


@functools.lru_cache(maxsize=512)
def tree_of(function: Function) -> FunctionNode:
    """The syntax tree of a function, to read."""
    return function.parse()


@functools.lru_cache(maxsize=512)
def expressions_of(function: Function) -> dict[Position, list[Any]]:
    """The expressions of a function by their positions, to read."""
    return find_expressions(tree_of(function))


def find_expressions(tree: FunctionNode) -> dict[Position, list[Any]]:
    """All expressions in a syntax tree by their positions, and augmented assignments."""
    nodes: dict[Position, list[Any]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, (ast.expr, ast.AugAssign)):
            nodes[Position.of(node)].append(node)
    return nodes


_FILES: dict[str, tuple[list[str], _File]] = {}
SEEN: WeakValueDictionary[Function, FunctionType] = WeakValueDictionary()
"""Functions that have no name by which to find them again, such as lambdas, as last seen."""


def read_function(code: CodeType, module: str) -> Function:
    """The function that a code object was compiled from.

    Args:
        code: the code of a whole function, not of a comprehension in it.
        module: name of the module that it comes from.

    Raises:
        NoSourceError: there is no source, or it is not what runs.
    """
    file = _read_file(code.co_filename, getattr(sys.modules.get(module), "__dict__", {}))
    if (code, module) not in file.functions:
        file.functions[code, module] = _extract(file, code, module)
    return file.functions[code, module]


def _extract(file: _File, code: CodeType, module: str) -> Function:
    if not any(code == other for other in file.codes[code.co_qualname]):
        raise NoSourceError(f"{code.co_filename} is not the source that runs")
    node = file.node_of(code)
    first = code.co_firstlineno
    if isinstance(node, ast.Lambda):
        text = ast.get_source_segment(file.text, node) or ""
    else:
        text = "\n".join(file.text.split("\n")[first - 1 : node.end_lineno])
    flags = code.co_flags & _FUTURES
    return Function(module, code.co_qualname, first, text, node.col_offset, code.co_freevars, flags)


def is_inside(inner: CodeType, outer: CodeType) -> bool:
    """Whether a code object is another one or was written inside of it."""
    return inner is outer or any(is_inside(inner, one) for one in _nested(outer))


def _nested(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))


class _File:
    """A source file, its functions and what they compile to."""

    def __init__(self, name: str, text: str) -> None:
        self.text = text
        self.functions: dict[tuple[CodeType, str], Function] = {}
        tree = ast.parse(text)
        self.codes: dict[str, list[CodeType]] = defaultdict(list)
        self._collect(compile(tree, name, "exec", dont_inherit=True))
        self.nodes: dict[int, list[FunctionNode]] = defaultdict(list)
        for node in ast.walk(tree):
            if isinstance(node, FunctionNode):
                decorators = getattr(node, "decorator_list", [])
                self.nodes[min(n.lineno for n in [node, *decorators])].append(node)

    def _collect(self, code: CodeType) -> None:
        for one in _nested(code):
            self.codes[one.co_qualname].append(one)
            self._collect(one)

    def node_of(self, code: CodeType) -> FunctionNode:
        """The smallest function around all of the code's instructions."""
        places = [Position(*map(int, p)) for p in code.co_positions() if None not in p]  # type: ignore[arg-type]
        found = [at for at in places if at.line != code.co_firstlineno]
        found = found or [at for at in places if at.end_column > at.column > 0]
        nodes = [
            node
            for node in self.nodes[code.co_firstlineno]
            if getattr(node, "name", "<lambda>") == code.co_name
            and all(Position.of(node).contains(at) for at in found)
        ]
        if not nodes:
            raise NoSourceError(f"{code.co_qualname} is not written as a function")
        return min(nodes, key=lambda node: (node.end_lineno or 0, -node.col_offset))


def _read_file(name: str, space: dict[str, Any]) -> _File:
    linecache.checkcache(name)  # reads the file again if it has changed
    lines = linecache.getlines(name, space)  # its loader knows what is in an archive
    if not lines:
        raise NoSourceError(f"there is no source for {name}")
    read, file = _FILES.get(name, (None, None))
    if file is None or read is not lines:
        try:
            file = _File(name, "".join(lines))
        except (SyntaxError, ValueError) as error:
            raise NoSourceError(f"{name} cannot be parsed: {error}") from error
        _FILES[name] = lines, file
    return file
