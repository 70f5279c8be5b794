"""Hand-written activations: a few torch calls that together mean one, such as ``x * sigmoid(x)``.

A formula is Python text. The finder and the interceptor show a `Tracker` every torch call that
they see; it remembers how values were made and tells when a call completes a formula.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_surgery._arguments import check_arguments
from transfer_surgery.activations.operators import name_of
from transfer_surgery.activations.registry import (
    Activation,
    Call,
    get_activation,
    recognise,
    register_variant,
    registered_name,
)

_ARITHMETIC = {"mul": "*", "multiply": "*", "add": "+", "sub": "-", "pow": "**"} | {
    **{"div": "/", "truediv": "/", "true_divide": "/"},
    **{"maximum": "maximum", "max": "maximum", "square": "**", "erf": "erf"},
    **{"gt": ">", "where": "where", "exp": "exp", "neg": "neg", "sin": "sin"},
}
_SYMBOLS = {ast.Mult: "*", ast.Add: "+", ast.Sub: "-", ast.Div: "/", ast.Pow: "**"}
_OPERANDS = {"square": 1, "erf": 1, "exp": 1, "neg": 1, "sin": 1, "where": 3}
"""How many a call has; two where it is not said."""
_FUNCTIONS = {"relu6": F.relu6, "softplus": F.softplus} | {
    name: getattr(torch, name)
    for name in ("sigmoid", "tanh", "relu", "erf", "maximum", "where", "exp", "sin")
}


class _Term(NamedTuple):
    """A call in a formula; its operands are terms, names and numbers."""

    label: str
    operands: tuple[Any, ...]

    def size(self) -> int:
        return 1 + sum(one.size() for one in self.operands if isinstance(one, _Term))


class _Formula(NamedTuple):
    activation: str
    written: str | None
    term: _Term


@dataclass(eq=False)
class Record:
    """How a value was made: the label of a call, and the records and numbers that it was given.

    A value that no known call made has no label. `event` is the finder's: the activation call that
    made the value.
    """

    value: Any = field(default=None, repr=False)
    label: str = ""
    operands: tuple[Any, ...] = ()
    event: Any = field(default=None, repr=False)


class Match(NamedTuple):
    """A completed formula: the activation, its input and operands, and what is inside it.

    `inner` holds a pair for each intermediate value: the call that reads it and its own record.
    """

    activation: Activation
    input: Any
    operands: tuple[Any, ...]
    inplace: bool
    inner: tuple[tuple[Record, Record], ...]


class _Bound(NamedTuple):
    names: dict[str, Any]
    inner: tuple[tuple[Record, Record], ...] = ()


_FORMULAS: dict[str, list[_Formula]] = {}


def register_formula(name: str, text: str, *, exact: bool = False) -> None:
    """Recognise an activation that networks write as a formula.

    Args:
        name: a registered activation.
        text: the formula in ``x`` with ``+ - * / ** >``, numbers and the functions relu, relu6,
            sigmoid, tanh, softplus, erf, exp, sin, where and maximum. Parameters of the
            activation stand for numbers, other names for tensors, its operands. Sums and products
            match in either order.
        exact: whether the registered value computes the same bits. Otherwise the formula itself
            is evaluated at such sites, so that conversion changes nothing.

    Raises:
        ValueError: an unknown activation; no call, no ``x`` or something else in the text.

    Examples:
        >>> register_formula("squared_relu", "relu(x) ** 2.0", exact=True)
    """
    check_arguments(register_formula, locals())
    get_activation(name)
    try:
        expression = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"formula {text!r}: {error.msg}.") from error
    term = _parse(expression)
    names = [n.id for n in ast.walk(expression) if isinstance(n, ast.Name)]
    if not isinstance(term, _Term) or "x" not in names:
        raise ValueError(f"formula {text!r}: expected a call or an operation on x.")
    free = [n for n in dict.fromkeys(names) if n not in _FUNCTIONS and n != "x"]
    if not exact:
        parameters = {k: v for k, v in get_activation(name).parameters if k in free}
        operands = tuple(n for n in free if n not in parameters)
        defaults = [f"{n}={parameters[n]!r}" for n in free if n in parameters]
        value = eval(f"lambda {', '.join(['x', *operands, *defaults])}: {text}", dict(_FUNCTIONS))
        register_variant(get_activation(name).name, text, value, operands)
    formulas = _FORMULAS.setdefault(term.label, [])
    formulas.append(_Formula(name, None if exact else text, term))
    formulas.sort(key=lambda formula: -formula.term.size())


def _parse(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _Term("neg", (_parse(node.operand),))
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Gt) and len(node.ops) == 1:
        return _Term(">", (_parse(node.left), _parse(node.comparators[0])))
    if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
        return _Term(_SYMBOLS[type(node.op)], (_parse(node.left), _parse(node.right)))
    if isinstance(node, ast.Call) and ast.unparse(node.func) in _FUNCTIONS and not node.keywords:
        return _Term(ast.unparse(node.func), tuple(_parse(one) for one in node.args))
    raise ValueError(
        f"a formula cannot contain {ast.unparse(node)!r}; it may use + - * / ** >, numbers, names "
        f"and {', '.join(_FUNCTIONS)}."
    )


class Tracker:
    """Remembers how tensors were made."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}

    def known(self, value: Any) -> Record | None:
        """The record of a value, if there is one."""
        return self._records.get(id(value))

    def call(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Record | None, Match | None, Call | None]:
        """Look at a call before it is made.

        Args:
            function: a torch function or tensor method.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            A record to pass to `made` together with the result, None for a call that no formula
            contains; the formula that the call completes, if any; and the activation that it is by
            itself, if any.
        """
        call = recognise(function, args, kwargs)
        if call is not None:
            found: Any = str(call.activation), (call.input, *call.operands)
        else:
            found = _read_arithmetic(function, args, kwargs)
        if found is None:
            return None, None, call
        record = Record(None, found[0], tuple(map(self._operand, found[1])))
        return record, self._match(record, overwrites(function)), call

    def _operand(self, value: Any) -> Any:
        """The record of a tensor; one without a label where no known call made it."""
        if not isinstance(value, Tensor):
            return value
        return self._records.setdefault(id(value), Record(value))

    def made(
        self, record: Record | None, function: Any, args: tuple[Any, ...], result: Any
    ) -> None:
        """Note the result of a call."""
        if overwrites(function) and args:
            self._records.pop(id(args[0]), None)  # what was known of the old value is void
        if record is not None:
            record.value = result
            self._records[id(result)] = record

    def _match(self, record: Record, inplace: bool) -> Match | None:
        for formula in _FORMULAS.get(record.label, ()):
            bound = _bind(formula.term, record, _Bound({}))
            if bound is None:
                continue
            names = dict(bound.names)
            x = names.pop("x")
            numbers = {k: v for k, v in names.items() if not isinstance(v, Record)}
            tensors = {k: v for k, v in names.items() if isinstance(v, Record)}
            if formula.written:
                numbers["variant"] = formula.written
            try:
                activation = get_activation(formula.activation, **numbers)
            except ValueError:
                continue  # a number where the activation takes a tensor
            used = [x, *tensors.values()]
            if set(tensors) != set(activation.operands) or x in tensors.values():
                continue
            if any(self._records.get(id(one.value)) is not one for one in used):
                continue  # the value has been overwritten since
            given = tuple(tensors[name].value for name in activation.operands)
            return Match(activation, x.value, given, inplace, bound.inner)
        return None


def _bind(part: Any, given: Any, bound: _Bound) -> _Bound | None:
    """Bind the names in a part of a formula to what was given there."""
    if isinstance(part, str):
        known = bound.names.setdefault(part, given)
        same = known is given or (not isinstance(given, Record) and known == given)
        return bound if same and (part != "x" or isinstance(given, Record)) else None
    if not isinstance(part, _Term):
        same = isinstance(given, (int, float)) and given == part
        return bound if same else None
    if not isinstance(given, Record) or given.label != part.label:
        return None
    orders = [given.operands]
    if part.label in ("*", "+"):
        orders.append(given.operands[::-1])
    for operands in orders:
        trial: _Bound | None = _Bound(dict(bound.names), bound.inner)
        for one, operand in zip(part.operands, operands, strict=False):
            if isinstance(one, _Term) and isinstance(operand, Record) and trial is not None:
                trial = trial._replace(inner=(*trial.inner, (given, operand)))
            trial = None if trial is None else _bind(one, operand, trial)
        if trial is not None and len(part.operands) == len(operands):
            return trial
    return None


def _read_arithmetic(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, tuple[Any, ...]] | None:
    """Label and operands of a call that may be part of a formula, and is no activation."""
    name = _base_name(function)
    if name not in _ARITHMETIC or kwargs or len(args) != _OPERANDS.get(name, 2):
        return None
    if name == "where" and function is not torch.where:  # a method takes them in another order
        return None
    if name == "square":
        args = (*args, 2)
    tensors = sum(isinstance(one, Tensor) for one in args)
    numbers = sum(isinstance(one, (int, float)) and not isinstance(one, bool) for one in args)
    if tensors + numbers != len(args) or tensors < (2 if name in ("max", "maximum") else 1):
        return None
    return _ARITHMETIC[name], args


def may_be_activation(function: Any) -> bool:
    """Whether a torch function may mean an activation, or be a part of one."""
    return registered_name(function) is not None or _base_name(function) in _ARITHMETIC


def _base_name(function: Any) -> str:
    """``mul`` for ``torch.mul``, ``Tensor.mul_``, ``operator.mul`` and ``operator.imul``."""
    name = name_of(function)
    if hasattr(function, "__code__") and getattr(Tensor, f"__{name}__", None) is not function:
        return ""  # somebody's own function of that name
    return name[1:] if _is_augmented(function, name) else name.rstrip("_")


def overwrites(function: Any) -> bool:
    """Whether a call changes its first argument."""
    name = name_of(function)
    if name in ("setitem", "__setitem__") or _is_augmented(function, name):
        return True
    return name.endswith("_") and not name.startswith("__")


def _is_augmented(function: Any, name: str) -> bool:
    """Whether it is ``operator.iadd`` or one of its like."""
    return getattr(operator, name, None) is function and (
        name[:1] == "i" and hasattr(operator, name[1:])
    )
