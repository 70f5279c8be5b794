"""Hand-written activations: a few torch calls that together mean one, such as ``x * sigmoid(x)``.

A formula is Python text. The finder and the interceptor show a `Tracker` every torch call that
they see; it remembers how values were made and tells when a call completes a formula.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from transfer_surgery._arguments import check_arguments
from transfer_surgery.activations.operators import name_of, tags_of
from transfer_surgery.activations.registry import (
    Activation,
    Call,
    called_activations,
    get_activation,
    read_variants,
    recognise,
    register_variant,
    registered_name,
)

_OPERATORS = {
    **dict.fromkeys(("mul", "multiply"), "*"),
    **dict.fromkeys(("add",), "+"),
    **dict.fromkeys(("sub", "subtract", "rsub"), "-"),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide", "rdiv", "rtruediv"), "/"),
    **dict.fromkeys(("pow", "rpow", "square"), "**"),
    **dict.fromkeys(("gt", "greater"), ">"),
    **dict.fromkeys(("ge", "greater_equal"), ">="),
    **dict.fromkeys(("lt", "less"), "<"),
    **dict.fromkeys(("le", "less_equal"), "<="),
    **dict.fromkeys(("neg", "negative"), "neg"),
    **dict.fromkeys(("max", "maximum", "fmax", "clamp_min"), "maximum"),
    **dict.fromkeys(("min", "minimum", "fmin", "clamp_max"), "minimum"),
}
_SYMBOLS: dict[type[ast.AST], str] = {
    **{ast.Mult: "*", ast.Add: "+", ast.Sub: "-", ast.Div: "/", ast.Pow: "**"},
    **{ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<="},
}
_REVERSED = ("rsub", "rdiv", "rtruediv", "rpow")
_CONSTANTS = ("zeros_like", "ones_like", "type_as")
_CASTS: dict[str, torch.dtype | None] = {
    **{"float": torch.float32, "double": torch.float64},
    **{"half": torch.float16, "bfloat16": torch.bfloat16},
    **{"to": None, "type": None, "type_as": None},
}
_LONGEST = 400
"""Characters of a formula that is read from what a network does."""
_MOST = 40
"""Operations of such a formula."""


def _is_elementwise(name: str) -> bool:
    """Whether torch has an element-wise function of that name."""
    tags = tags_of(name) if hasattr(torch, name) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _function(name: str) -> Any:
    """What a name in a formula means; None for names that stand for tensors and numbers."""
    if name in ("relu6", "softplus") or (hasattr(F, name) and _is_elementwise(name)):
        return getattr(F, name, None) or getattr(torch, name)
    if name in _CONSTANTS:
        return getattr(torch, name, None) or getattr(Tensor, name)
    return getattr(torch, name) if _is_elementwise(name) else None


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

    A value that no known call made has no label. `activation` is what the call means, if it is one
    that means an activation by itself. `root` is the one value that everything was computed from;
    the record itself where there are several. `event` is the finder's: the activation call that
    made the value.
    """

    value: Any = field(default=None, repr=False)
    label: str = ""
    operands: tuple[Any, ...] = ()
    activation: Activation | None = None
    event: Any = field(default=None, repr=False)
    root: Record = field(init=False, repr=False)

    def __post_init__(self) -> None:
        roots = {one.root for one in self.given}
        self.root = roots.pop() if len(roots) == 1 else self

    @property
    def given(self) -> list[Record]:
        """The operands that are tensors."""
        return [one for one in self.operands if isinstance(one, Record)]


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
        text: the formula in ``x`` with ``+ - * / ** > < >= <=``, numbers and element-wise
            functions of torch, such as ``sigmoid(x)``. Parameters of the activation stand for
            numbers, other names for tensors, its operands. Sums and products match in either
            order.
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
        term = _parse(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"formula {text!r}: {error.msg}.") from error
    names = _free_names(text)
    if not isinstance(term, _Term) or "x" not in names:
        raise ValueError(f"formula {text!r}: expected a call or an operation on x.")
    free = [name for name in names if name != "x"]
    if not exact:
        parameters = {k: v for k, v in get_activation(name).parameters if k in free}
        operands = tuple(n for n in free if n not in parameters)
        defaults = [f"{n}={parameters[n]!r}" for n in free if n in parameters]
        value = _compiled(text, ("x", *operands, *defaults))
        register_variant(get_activation(name).name, text, value, operands)
    formulas = _FORMULAS.setdefault(term.label, [])
    formulas.append(_Formula(name, None if exact else text, term))
    formulas.sort(key=lambda formula: -formula.term.size())


def _parse(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.Name():
            return node.id
        case ast.UnaryOp(op=ast.USub()):
            value = _parse(node.operand)
            return _Term("neg", (value,)) if isinstance(value, (str, _Term)) else -value
        case ast.BinOp() if type(node.op) in _SYMBOLS:
            return _Term(_SYMBOLS[type(node.op)], (_parse(node.left), _parse(node.right)))
        case ast.Compare(ops=[op], comparators=[right]) if type(op) in _SYMBOLS:
            return _Term(_SYMBOLS[type(op)], (_parse(node.left), _parse(right)))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if _function(name) is not None:
            return _Term(name, tuple(_parse(one) for one in node.args))
    raise ValueError(
        f"a formula cannot contain {ast.unparse(node)!r}; it may use + - * / ** > < >= <=, "
        "numbers, names and element-wise functions of torch."
    )


def _compiled(text: str, parameters: tuple[str, ...] = ("x",)) -> Callable[..., Tensor]:
    """A formula as a function; the text must have been parsed before."""
    names = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    functions = {name: _function(name) for name in names if _function(name) is not None}
    made: Callable[..., Tensor] = eval(f"lambda {', '.join(parameters)}: {text}", functions)
    return made


@read_variants
def _read_variant(text: str) -> Callable[..., Tensor]:
    """The value of a variant that a network of an earlier process had."""
    if len(text) > _LONGEST or _free_names(text) != ["x"]:
        raise ValueError(f"{text[:80]!r} is no formula in x")
    _parse(ast.parse(text, mode="eval").body)
    return _compiled(text)


def _free_names(text: str) -> list[str]:
    """The names in a formula that stand for values, in their order."""
    names = [n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)]
    return [name for name in dict.fromkeys(names) if _function(name) is None]


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
            found = self._cast(function, args, kwargs) or _read(function, args, kwargs)
        if found is None:
            return None, None, call
        label, given = found
        activation = None if call is None else call.activation
        record = Record(None, label, tuple(map(self._operand, given)), activation)
        inplace = overwrites(function)
        match = self._match(record, inplace) or self._match_by_value(record, inplace)
        return record, match, call

    def _cast(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[str, tuple[Any, ...]] | None:
        """A mask that becomes numbers of the type of what it was made from."""
        name = _base_name(function)
        if name not in _CASTS or not isinstance(args[0], Tensor) or args[0].dtype != torch.bool:
            return None
        mask, given = self.known(args[0]), (*args[1:], *kwargs.values())
        types = [getattr(one, "dtype", one) for one in given]
        types = [one for one in (_CASTS[name], *types) if isinstance(one, torch.dtype)]
        if mask is None or types != [getattr(mask.root.value, "dtype", None)]:
            return None
        return "type_as", (args[0], mask.root.value)

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
            if set(tensors) != set(activation.operands):
                continue
            if any(one.root is x.root for one in tensors.values()):
                continue  # what should be a learned tensor depends on the input
            if any(self._records.get(id(one.value)) is not one for one in used):
                continue  # the value has been overwritten since
            given = tuple(tensors[name].value for name in activation.operands)
            return Match(activation, x.value, given, inplace, bound.inner)
        return None

    def _match_by_value(self, record: Record, inplace: bool) -> Match | None:
        """Any other way to write a known activation: by the values that it gives."""
        if record.activation is not None or record.root is record:
            return None
        for x, text, inner in _written(record):
            name = _named_by_value(text, _sources())
            same = {one.activation.name for _, one in inner if one.activation is not None}
            if name is None or self._records.get(id(x.value)) is not x:
                continue
            activation = get_activation(name, variant=text)
            if activation.name not in same:
                return Match(activation, x.value, (), inplace, inner)
        return None


def _written(record: Record) -> Iterator[tuple[Record, str, tuple[tuple[Record, Record], ...]]]:
    """A value as formulas in one of the values that it was computed from, the shortest first."""
    seen, todo = [record], [record]
    while todo:
        one = todo.pop(0)
        if one is not record.root:
            new = [part for part in one.given if part not in seen]
            seen += new
            todo += new
    for x in seen[1:]:
        inner: dict[tuple[Record, Record], None] = {}
        text = _text(record, x, inner)
        if text is not None:
            yield x, ast.unparse(ast.parse(text)), tuple(inner)


def formula_of(record: Record, x: Record) -> str | None:
    """How a value was computed from another one; None where that cannot be written in short."""
    text = _text(record, x, {})
    return text and ast.unparse(ast.parse(text))


def _text(one: Any, x: Record, inner: dict[tuple[Record, Record], None]) -> str | None:
    if one is x:
        return "x"
    if not isinstance(one, Record):
        return repr(one)
    if not one.label or one is x.root or len(inner) > _MOST:
        return None
    inner |= {(one, part): None for part in one.given if part is not x}
    parts: list[str] = []
    for operand in one.operands:
        part = _text(operand, x, inner)
        if part is None or sum(map(len, parts)) > _LONGEST - 40:
            return None
        parts.append(part)
    if one.activation is not None:
        return _text_of_activation(one.activation, parts)
    if one.label == "neg":
        return f"(-{parts[0]})"
    if not one.label.isidentifier():
        return f"({parts[0]} {one.label} {parts[1]})"
    return f"{one.label}({', '.join(parts)})"


def _text_of_activation(activation: Activation, parts: list[str]) -> str | None:
    parameters = dict(activation.parameters)
    if variant := parameters.pop("variant", None):
        tree = ast.parse(variant, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "x":
                node.id = parts[0]
        return f"({ast.unparse(tree)})" if len(parts) == 1 else None
    numbers = parameters.values()
    if _function(activation.name) is None or not all(isinstance(v, (int, float)) for v in numbers):
        return None
    return f"{activation.name}({', '.join([*parts, *map(repr, numbers)])})"


@functools.lru_cache(maxsize=4096)
def _named_by_value(text: str, sources: tuple[str, ...]) -> str | None:
    """Which of some activations a formula in ``x`` is, as its values tell; None for others.

    It is then registered as a variant of that activation.
    """
    with _disable_current_modes(), torch.no_grad():  # real numbers, also when tensors are fake
        x = torch.linspace(-7.9, 8.1, 65, dtype=torch.float64, device="cpu")
        try:
            value = _compiled(text)
            y = value(x)
        except (RuntimeError, TypeError, ValueError, ArithmeticError):
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.isfinite().all():
            return None
        if torch.allclose(y.double(), x):
            return None
        slope = min(max(float(y[0] / x[0]), 0.0), 1.0)
        for name in (*sources, f"leaky_relu(negative_slope={slope:.9g})"):
            if torch.allclose(get_activation(name)(x), y.double(), rtol=1e-5, atol=1e-9):
                register_variant(get_activation(name).name, text, value)
                return name
    return None


def _sources() -> tuple[str, ...]:
    """The activations that networks have, and that take nothing but their input."""
    written = {one.activation for several in _FORMULAS.values() for one in several}
    names = dict.fromkeys((*called_activations(), *sorted(written)))
    return tuple(name for name in names if not get_activation(name).operands)


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


def _read(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, tuple[Any, ...]] | None:
    """Label and operands of a call that may be part of a formula, and is no activation."""
    name = _base_name(function)
    label = _OPERATORS.get(name, name if name in _CONSTANTS or _is_elementwise(name) else "")
    if name in ("clamp", "clip"):
        low, high = (*args[1:], None, None)[:2]
        bounds = {"min": low, "max": high} | dict(kwargs)
        given = {key: bound for key, bound in bounds.items() if bound is not None}
        if len(given) == 1:
            (key, bound), kwargs = given.popitem(), {}
            name, args = f"clamp_{key}", (args[0], bound)
    if name in ("clamp_min", "clamp_max"):  # a number is no operand of maximum
        label = _OPERATORS[name] if isinstance(args[-1], Tensor) else name
    if function is Tensor.where:
        args = (args[1], args[0], args[2])
    if name == "square":
        args = (*args, 2)
    if name in _REVERSED:
        args = args[::-1]
    tensors = sum(isinstance(one, Tensor) for one in args)
    numbers = sum(isinstance(one, (int, float)) and not isinstance(one, bool) for one in args)
    if not label or kwargs or not tensors or tensors + numbers != len(args):
        return None
    if label in ("maximum", "minimum") and tensors < 2:  # of all elements, or along an axis
        return None
    return label, args


def may_be_activation(function: Any) -> bool:
    """Whether a torch function may mean an activation, or be a part of one."""
    name = _base_name(function)
    known = name in _OPERATORS or name in _CONSTANTS or name in _CASTS or _is_elementwise(name)
    return registered_name(function) is not None or known


def _base_name(function: Any) -> str:
    """``mul`` for ``torch.mul``, ``Tensor.mul_``, ``operator.mul`` and ``operator.imul``."""
    name = name_of(function)
    own = (getattr(Tensor, one, None) for one in (name, f"__{name}__"))
    if hasattr(function, "__code__") and function not in own:
        return ""  # somebody's own function of that name
    return name[1:] if _is_augmented(function, name) else name.strip("_")


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
