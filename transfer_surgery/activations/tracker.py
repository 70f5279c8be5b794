"""How values were made: torch calls that together may be a hand-written activation.

The finder and the interceptor show a `Tracker` every torch call that they see; it tells when a call
completes an activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfer_surgery.activations.calls import Call, recognise
from transfer_surgery.activations.expressions import LONGEST, join, number
from transfer_surgery.activations.formulas import FORMULAS, Bound, bind
from transfer_surgery.activations.operations import CASTS, base_name, operation, overwrites
from transfer_surgery.activations.recognition import activation_written_as
from transfer_surgery.activations.registry import Activation

_MOST = 40
"""Operations of an expression that is read from what a network does."""
_PLAIN = {"+", "-", "*", "/", "**", "neg"}


@dataclass(eq=False)
class Record:
    """How a value was made: the label of a call, and the records and numbers that it was given.

    A value that no known call made has no label. `root` is the one value that everything was
    computed from; the record itself where there are several. `event` is the finder's: the
    activation call that made the value.
    """

    value: Any = field(default=None, repr=False)
    label: str = ""
    operands: tuple[Any, ...] = ()
    event: Any = field(default=None, repr=False)
    _root: Record | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        roots = {one.root for one in self.given}
        # Nothing refers to itself: the values go when the records do.
        self._root = roots.pop() if len(roots) == 1 else None

    @property
    def root(self) -> Record:
        return self._root or self

    @property
    def given(self) -> list[Record]:
        """The operands that are tensors."""
        return [one for one in self.operands if isinstance(one, Record)]


class Match(NamedTuple):
    """A completed activation: what it is, its input and operands, and what is inside it.

    `inner` holds a pair for each intermediate value: the call that reads it and its own record.
    """

    activation: Activation
    input: Any
    operands: tuple[Any, ...]
    inplace: bool
    inner: tuple[tuple[Record, Record], ...]


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
            A record to pass to `made` together with the result, None for a call that no expression
            contains; the activation that the call completes, if any; and the one that it is by
            itself, if any.
        """
        self._records.pop(id(kwargs.get("out")), None)  # it is written into
        call = recognise(function, args, kwargs)
        if call is not None:
            found: Any = str(call.activation), (call.input, *call.operands)
        else:
            found = self._cast(function, args, kwargs) or operation(function, args, kwargs)
        if found is None:
            return None, None, call
        label, given = found
        record = Record(None, label, tuple(map(self._operand, given)))
        if call is not None:
            return record, None, call
        inplace = overwrites(function)
        return record, self._by_value(record, inplace) or self._formula(record, inplace), None

    def _cast(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[str, tuple[Any, ...]] | None:
        """A mask that becomes numbers of the type of what it was made from."""
        name = base_name(function)
        if name not in CASTS or not isinstance(args[0], Tensor) or args[0].dtype != torch.bool:
            return None
        mask, given = self.known(args[0]), (*args[1:], *kwargs.values())
        types = [getattr(one, "dtype", one) for one in given]
        types = [one for one in (CASTS[name], *types) if isinstance(one, torch.dtype)]
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

    def _is_current(self, record: Record) -> bool:
        """Whether a value has not been overwritten since."""
        return self._records.get(id(record.value)) is record

    def _formula(self, record: Record, inplace: bool) -> Match | None:
        """The activation with learned tensors that a call completes, if any."""
        for formula in FORMULAS.get(record.label, ()):
            bound = bind(formula.term, record, Bound({}))
            if bound is None:
                continue
            activation, x = formula.activation(), bound.names.pop("x")
            operands = [bound.names[name] for name in activation.operands]
            if any(operand.root is x.root for operand in operands):
                continue  # what should be a learned tensor depends on the input
            if all(map(self._is_current, (x, *operands))):
                given = tuple(operand.value for operand in operands)
                return Match(activation, x.value, given, inplace, bound.inner)
        return None

    def _by_value(self, record: Record, inplace: bool) -> Match | None:
        """The activation of one tensor that a call completes, if any, however it is written."""
        for x, text, inner in _written(record):
            activation = activation_written_as(text) if self._is_current(x) else None
            if activation is not None:
                return Match(activation, x.value, (), inplace, inner)
        return None


def _written(record: Record) -> Iterator[tuple[Record, str, tuple[tuple[Record, Record], ...]]]:
    """A value as expressions of one of the values that it was computed from, the shortest first."""
    if record.root is record:
        return
    seen = [record]
    for one in seen:  # grows while it is read
        if one is not record.root:
            seen += [part for part in dict.fromkeys(one.given) if part not in seen]
    if {one.label for one in seen if one is not record.root} <= _PLAIN:
        return  # arithmetic alone is no activation
    for x in seen[1:]:
        inner: dict[tuple[Record, Record], None] = {}
        text, _ = _text(record, x, inner) or ("", 0)
        if text and len(text) <= LONGEST:
            yield x, text, tuple(inner)


def formula_of(record: Record, x: Record) -> str | None:
    """How a value was computed from another one; None where that cannot be written in short."""
    text, _ = _text(record, x, {}) or (None, 0)
    return text


def _text(one: Any, x: Record, inner: dict[tuple[Record, Record], None]) -> tuple[str, int] | None:
    """A value as an expression of ``x``, and how strongly that binds; None where it is none.

    Args:
        one: a record or a number.
        x: what the expression is one of.
        inner: gets the pairs of `Match.inner`.
    """
    if one is x:
        return "x", 5
    if not isinstance(one, Record):
        return number(one)
    if not one.label or one is x.root or len(inner) > _MOST:
        return None
    inner |= {(one, part): None for part in one.given if part is not x}
    parts = []
    for operand in one.operands:
        part = _text(operand, x, inner)
        if part is None or len(part[0]) > LONGEST:
            return None
        parts.append(part)
    return join(one.label, parts)
