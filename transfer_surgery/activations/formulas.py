"""Hand-written activations that take learned tensors: found by their formula.

An activation of one tensor needs none, since `recognition` knows it by its values.
"""

from __future__ import annotations

import ast
import functools
from typing import Any, NamedTuple

from transfer_surgery._messages import check_arguments
from transfer_surgery.activations.expressions import SYMBOLS, names_in, parse, parts_of
from transfer_surgery.activations.recognition import is_same
from transfer_surgery.activations.registry import Activation, get_activation

_LABELS: dict[type, str] = {kind: symbol for symbol, kind in SYMBOLS.items()}


class Term(NamedTuple):
    """A call in a formula; its operands are terms, names and numbers."""

    label: str
    operands: tuple[Any, ...]


class Formula(NamedTuple):
    """An activation and one way to write it."""

    name: str
    text: str
    term: Term

    def activation(self) -> Activation:
        """The activation as it is, or a variant of it where the text rounds differently."""
        return _as_written(self.name, self.text)


class Bound(NamedTuple):
    """The records that the names of a formula stand for, and what is inside of it."""

    names: dict[str, Any]
    inner: tuple[tuple[Any, Any], ...] = ()


FORMULAS: dict[str, list[Formula]] = {}
"""By the label of the last call."""


def register_formula(name: str, text: str) -> None:
    """Recognise an activation with operands that networks write as a formula.

    Activations of ``x`` alone need no formula: they are recognised by their values, however they
    are written.

    Args:
        name: a registered activation that takes operands.
        text: the formula in ``x`` and the operands: ``+ - * / **``, comparisons, numbers,
            functions of torch that act on each element, and registered activations. Sums and
            products match in either order.

    Raises:
        ValueError: an unknown activation or one without operands; an operand that is missing; or
            something else in the text.

    Examples:
        >>> from transfer_surgery import register_activation
        >>> @register_activation("docs_scaled_tanh", operands=("scale",))
        ... def scaled_tanh(x, scale):
        ...     return scale * x.tanh()
        >>> register_formula("docs_scaled_tanh", "scale * tanh(x)")
    """
    check_arguments(register_formula, locals())
    activation = get_activation(name)
    tree = parse(text, get_activation)
    names = {"x", *activation.operands}
    if not activation.operands:
        raise ValueError(
            f"{activation} takes no operands: it is recognised by its values, without a formula."
        )
    if set(names_in(tree)) != names or isinstance(tree, ast.Name):
        raise ValueError(f"formula {text!r}: expected an operation on {', '.join(sorted(names))}.")
    if not is_same(get_activation(name, variant=text), activation):
        raise ValueError(f"formula {text!r} has other values than {activation}.")
    term = _term(tree)
    FORMULAS.setdefault(term.label, []).append(Formula(name, text, term))


@functools.cache
def _as_written(name: str, text: str) -> Activation:
    activation, variant = get_activation(name), get_activation(name, variant=text)
    return activation if is_same(variant, activation, exactly=True) else variant


def _term(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return name
        case ast.UnaryOp():
            label = "neg"
        case ast.BinOp(op=op) | ast.Compare(ops=[op]):
            label = _LABELS[type(op)]
        case ast.Call(func=func, keywords=keywords):
            parameters = ", ".join(map(ast.unparse, keywords))
            label = ast.unparse(func) + (f"({parameters})" if parameters else "")
    return Term(label, tuple(map(_term, parts_of(node))))


def bind(part: Any, given: Any, bound: Bound) -> Bound | None:
    """Bind the names in a part of a formula to the records that were given there."""
    is_record = hasattr(given, "operands")
    if isinstance(part, str):
        known = bound.names.get(part, given)
        names = {**bound.names, part: given}
        return bound._replace(names=names) if is_record and known is given else None
    if not isinstance(part, Term):
        return bound if not is_record and given == part else None
    if not is_record or given.label != part.label:
        return None
    orders = [given.operands]
    if part.label in ("*", "+"):
        orders.append(given.operands[::-1])
    for operands in orders:
        trial: Bound | None = bound
        for one, operand in zip(part.operands, operands, strict=False):
            if trial is not None and isinstance(one, Term) and hasattr(operand, "operands"):
                trial = trial._replace(inner=(*trial.inner, (given, operand)))
            trial = None if trial is None else bind(one, operand, trial)
        if trial is not None and len(part.operands) == len(operands):
            return trial
    return None
