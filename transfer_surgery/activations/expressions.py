"""Activations as text, such as ``x * sigmoid(1.702 * x)``: checked, and made a function.

The text holds numbers, names of tensors, ``+ - * / **``, comparisons, functions of torch that act
on each element, and registered activations with their parameters. Nothing else is read, and the
text has a bounded length: it may come from a file.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from transfer_surgery.activations.operators import tags_of

SYMBOLS: dict[str, type[ast.operator | ast.cmpop]] = {
    **{"+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "**": ast.Pow},
    **{">": ast.Gt, ">=": ast.GtE, "<": ast.Lt, "<=": ast.LtE},
}
_BINDING = {">": 0, ">=": 0, "<": 0, "<=": 0, "+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "**": 4}
_ATOM = 5

CONSTANTS = ("zeros_like", "ones_like", "type_as")
"""Calls that an expression may contain besides element-wise ones."""
LONGEST = 400
"""Characters of an expression."""


class Value(Protocol):
    """A registered activation."""

    @property
    def operands(self) -> tuple[str, ...]:
        """The tensors that it takes besides its input."""

    def __call__(self, x: Tensor, *operands: Tensor) -> Tensor:
        """Its value."""


Lookup = Callable[..., Value]
"""`get_activation`, which raises a ValueError for what is not registered."""


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether torch has a function of that name that acts on each element, without chance."""
    tags = tags_of(name) if hasattr(torch, name) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def function_named(name: str) -> Any:
    """The function of torch that a call in an expression means; None for activations."""
    if name in CONSTANTS:
        return getattr(torch, name, None) or getattr(Tensor, name)
    return getattr(torch, name) if is_elementwise(name) else None


def join(label: str, operands: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """The text of one operation on operands, and how strongly it binds.

    Args:
        label: a symbol, ``"neg"``, a function, or an activation as text.
        operands: the same pairs for what it operates on.

    Examples:
        >>> join("*", [("x", 5), join("+", [("x", 5), ("3", 5)])])
        ('x * (x + 3)', 2)
        >>> join("leaky_relu(negative_slope=0.2)", [("x", 5)])
        ('leaky_relu(x, negative_slope=0.2)', 5)
    """
    strength = _BINDING.get(label, _ATOM)
    if strength == _ATOM:
        name, _, parameters = label.partition("(")
        rest = [parameters.removesuffix(")")] if parameters else []
        return f"{name}({', '.join([*(text for text, _ in operands), *rest])})", _ATOM
    # The left operand of a power and the right one of the others need parentheses at a tie.
    ties = (1, 0) if label == "**" else (0, 1)
    parts = [
        text if binding >= strength + tie else f"({text})"
        for (text, binding), tie in zip(operands, ties, strict=False)
    ]
    return (f"-{parts[0]}" if label == "neg" else f"{parts[0]} {label} {parts[1]}"), strength


def number(value: float) -> tuple[str, int]:
    """A number as an operand of `join`."""
    plain = float(value) if isinstance(value, float) else value  # also of numpy's numbers
    text = repr(plain).replace("inf", "1e999")
    return text, _BINDING["neg"] if text.startswith("-") else _ATOM


def parse(text: str, lookup: Lookup) -> ast.expr:
    """The tree of an expression.

    Raises:
        ValueError: it contains something else than what the module's docstring lists.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"formula {str(text)[:80]!r}: longer than {LONGEST} letters.")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"formula {text!r}: {error.msg}.") from error
    _check(tree, lookup)
    return tree


def parts_of(node: ast.AST) -> Sequence[ast.expr]:
    """What a part of an expression operates on."""
    match node:
        case ast.BinOp(left=left, right=right):
            return left, right
        case ast.Compare(left=left, comparators=[right]):
            return left, right
        case ast.UnaryOp(operand=operand):
            return (operand,)
        case ast.Call(args=args):
            return args
    return ()


def names_in(tree: ast.expr) -> Iterator[str]:
    """The names of its tensors and parameters, in the order in which they stand."""
    if isinstance(tree, ast.Name):
        yield tree.id
    for part in parts_of(tree):
        yield from names_in(part)


def function_of(tree: ast.expr, arguments: Sequence[str], lookup: Lookup) -> Callable[..., Tensor]:
    """The expression as a function of positional arguments, and of keywords for its other names."""
    space: dict[str, Any] = {}
    others = [name for name in dict.fromkeys(names_in(tree)) if name not in arguments]
    body = ast.unparse(_Bind(space, lookup).visit(ast.parse(ast.unparse(tree), mode="eval")))
    head = ", ".join((*arguments, *others))
    function: Callable[..., Tensor] = eval(f"lambda {head}: {body}", space)
    return function


class _Bind(ast.NodeTransformer):
    """Lets each call call an object in the name space: a function, or an activation."""

    def __init__(self, space: dict[str, Any], lookup: Lookup) -> None:
        self._space, self._lookup = space, lookup

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        parameters = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        bound = f"_{name}_{len(self._space)}"
        value = _registered(name, parameters, self._lookup)
        self._space[bound] = function_named(name) if value is None else value
        node.func, node.keywords = ast.Name(bound), []
        return node


def _registered(name: str, parameters: dict[str, Any], lookup: Lookup) -> Value | None:
    try:
        return lookup(name, **parameters)
    except ValueError:
        return None


def _check(node: ast.expr, lookup: Lookup) -> None:
    match node:
        case ast.Name() | ast.Constant(value=int() | float()):
            pass
        case ast.BinOp(op=op) if type(op) in SYMBOLS.values() and any(names_in(node)):
            pass  # with a tensor in it: powers of numbers may take for ever
        case ast.Compare(ops=[op]) if type(op) in SYMBOLS.values():
            pass
        case ast.UnaryOp(op=ast.USub()):
            pass
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            try:
                given = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
            except ValueError:
                raise ValueError(_refusal(node)) from None
            value = _registered(name, given, lookup)
            if value is None and (given or function_named(name) is None):
                raise ValueError(_refusal(node))
            if value is not None and len(args) != 1 + len(value.operands):
                raise ValueError(_refusal(node))
        case _:
            raise ValueError(_refusal(node))
    for part in parts_of(node):
        _check(part, lookup)


def _refusal(node: ast.expr) -> str:
    return (
        f"a formula cannot contain {ast.unparse(node)!r}; it may use {' '.join(SYMBOLS)}, numbers, "
        "names, element-wise functions of torch and registered activations."
    )
