"""What edited code can name: its module, its units, and objects that are not the user's."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transfer_surgery.sites.copies import UneditableError
from transfer_surgery.sites.route import End, Expression, Way
from transfer_surgery.sites.source import FunctionNode
from transfer_surgery.sites.swap import PREFIX, missed


class Caller(NamedTuple):
    """What all functions of a caller share: its own class, and calls that did not run."""

    base: type
    unseen: Mapping[Expression, str]


class Scope:
    """The names of one edited function.

    Attributes:
        objects: what its closure holds beside the user's own, by names.
    """

    def __init__(
        self, ways: Sequence[Way], caller: Caller, node: FunctionNode, *, entry: bool
    ) -> None:
        self.ways, self.caller, self.entry = ways, caller, entry
        self.function = ways[0].function
        self.objects: dict[str, Any] = {}
        self._first = _first_argument(node)

    def module(self) -> ast.expr:
        """The module, whatever the function calls its first argument."""
        if self._first is None:
            raise UneditableError(f"{self.function.qualname} has no name for the module")
        return ast.parse(self._first, mode="eval").body

    def unit(self, name: str) -> ast.expr:
        """``self.relu_0``."""
        return ast.Attribute(self.module(), name, ast.Load())

    def below(self, names: Sequence[str]) -> ast.expr:
        """A module below this one: ``self._modules["block"]._modules["act"]``."""
        module = self.module()
        for name in names:
            children = ast.Attribute(module, "_modules", ast.Load())
            module = ast.Subscript(children, ast.Constant(name), ast.Load())
        return module

    def given(self, i: int) -> ast.expr:
        """The unit of a way, or the iterator over its units; and the module that it stands for."""
        way, name = self.ways[i], read(f"{PREFIX}{i}")
        if not self.entry:
            return name
        unit: ast.expr = ast.Constant(None) if way.units[0] is None else self.unit(way.units[0])
        given, end = name if way.several else unit, way.steps[-1]
        if isinstance(end, End) and isinstance(end.expected, tuple):
            return ast.Tuple([given, self.below(end.expected)], ast.Load())
        return given

    def refer(self, kind: str, value: Any) -> ast.expr:
        """A name for an object that is not the user's."""
        name = f"{PREFIX}{kind}{len(self.objects)}"
        self.objects[name] = value
        return read(name)

    def missed(self, node: Any, name: str, how: str) -> ast.expr:
        """The same value, with a warning that an activation has no gates."""
        text = self.warning(node).format(name=name, how=how)
        return ast.Call(self.refer("m", missed), [node, ast.Constant(text)], [])

    def warning(self, node: Any) -> str:
        """The text of that warning, with the activation's ``name`` and ``how`` open."""
        return (
            f"{self.caller.base.__name__} calls {{name}} ({self.function.qualname}, line "
            f"{node.lineno - self.function.first_line + 1} of it) {{how}} when the model was "
            "converted: it has no gates. Revert, and convert in the state and with an "
            "example_input that do this."
        )


def read(name: str) -> ast.Name:
    """An expression that reads a name."""
    return ast.Name(name, ast.Load())


def _first_argument(node: FunctionNode) -> str | None:
    """The first argument in the function's words; None where it has none, or changes it."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    first = arguments[0] if arguments else node.args.vararg
    if first is None:
        return None
    others = (n for n in ast.walk(node) if n is not first)
    if any(
        (isinstance(n, ast.arg) and n.arg == first.arg)
        or (isinstance(n, ast.Name) and n.id == first.arg and not isinstance(n.ctx, ast.Load))
        for n in others
    ):
        return None
    return first.arg if arguments else f"{first.arg}[0]"
