"""Hand-written activations of one tensor: known by their values, however they are written.

The expression is evaluated at a few points in float64 and compared with the registered activations;
numbers in the text stand for their parameters.
"""

from __future__ import annotations

import ast
import functools
import itertools
import typing
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from transfer_surgery.activations.expressions import function_of, parse, parts_of
from transfer_surgery.activations.registry import (
    Activation,
    entry_of,
    get_activation,
    registered_names,
)

# Constants are written with five digits and more: sqrt(2 / pi), 1 / sqrt(2).
_RTOL, _ATOL = 1e-5, 1e-6
_MOST_NUMBERS = 8


def activation_written_as(text: str) -> Activation | None:
    """The activation that an expression of ``x`` is, if any.

    Where the registered activation rounds differently, the expression is a variant of it, so that
    conversion changes no bit.

    Examples:
        >>> activation_written_as("x * sigmoid(1.5 * x)")
        Activation(name='swish', parameters=(('beta', 1.5),))
        >>> str(activation_written_as("x / (1 + exp(-x))"))
        "silu(variant='x / (1 + exp(-x))')"
        >>> activation_written_as("softplus(x) + 0.1")
    """
    return _activation_written_as(text, registered_names())


@functools.lru_cache(maxsize=4096)
def _activation_written_as(text: str, names: tuple[str, ...]) -> Activation | None:
    tree = parse(text, get_activation)
    if sum(1 for node in ast.walk(tree) if parts_of(node)) < 2:
        return None  # one call alone is registered where it is meant as an activation
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        x = _points()
        value = _value(tree, x)
        if value is None or not value.isfinite().all():
            return None
        if torch.allclose(value.diff(n=3), x[:-3] * 0, atol=1e-9):
            return None  # squares and straight lines stand in norms everywhere
        found = (_value(part, x) for part in _calls_inside(tree))
        parts = [part for part in found if part is not None]
        if any(_is_close(part, value) for part in parts):
            return None  # ``softplus(x) + 1e-6`` is softplus and something that has to stay
        close = (one for one in _candidates(tree, names) if _is_close(_value_of(one, x), value))
        activation = next(close, None)
        is_rescaled = any(_is_rescaled(part, value) for part in parts)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if activation is None or activation.name in called:
        return None  # ``2 * relu(x / 2)`` is a ReLU and what surrounds it
    if is_rescaled and activation != get_activation(activation.name):
        return None  # ``2 * silu(x / 2)`` has the values of a swish, but is a SiLU
    variant = get_activation(activation, variant=text)
    return activation if is_same(variant, activation, exactly=True) else variant


def is_same(one: Activation, other: Activation, exactly: bool = False) -> bool:
    """Whether two activations have the same values; with `exactly` the same bits and gradients."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        if not exactly:
            with torch.no_grad():
                return _is_close(_value_of(one, _points()), _value_of(other, _points()))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ends = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
            x = torch.cat([_points(), torch.linspace(-9, 9, 1001, dtype=torch.float64), ends])
            first, second = (_value_and_gradients(f, x.to(dtype)) for f in (one, other))
            for a, b in zip(first, second, strict=True):
                if a.dtype != b.dtype or not torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4)):
                    return False
                if not torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()):
                    return False
    return True


def _points() -> Tensor:
    return torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")


def _operands(activation: Activation) -> list[Tensor]:
    return [torch.tensor(0.3 + 0.4 * i, device="cpu") for i in range(len(activation.operands))]


def _value_of(activation: Activation, x: Tensor) -> Tensor | None:
    try:
        return activation(x, *(one.to(x.dtype) for one in _operands(activation)))
    except Exception:  # whatever somebody's own activation raises in float64
        return None


def _value_and_gradients(activation: Activation, x: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_()]
        leaves += [one.to(x.dtype).requires_grad_() for one in _operands(activation)]
        y = activation(*leaves)
        return y.detach(), *torch.autograd.grad(y[y.isfinite()].sum(), leaves)


def _value(tree: ast.expr, x: Tensor) -> Tensor | None:
    try:
        value = function_of(tree, ("x",), get_activation)(x)
    except (RuntimeError, TypeError, ValueError, ArithmeticError):
        return None
    is_whole = isinstance(value, Tensor) and (value.shape, value.dtype) == (x.shape, x.dtype)
    return value if is_whole else None


def _is_close(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.allclose(one, other, _RTOL, _ATOL)


def _is_rescaled(part: Tensor, value: Tensor) -> bool:
    """Whether a value is a multiple of a part of it, and a constant."""
    one, other = part - part.mean(), value - value.mean()
    return bool((one @ other) ** 2 > (1 - 1e-12) * (one @ one) * (other @ other))


def _calls_inside(tree: ast.expr) -> Iterator[ast.expr]:
    for part in parts_of(tree):
        if isinstance(part, (ast.BinOp, ast.Call, ast.UnaryOp)):
            yield part
            yield from _calls_inside(part)


@functools.cache
def _texts(name: str, key: str) -> tuple[Any, ...]:
    """The texts that a parameter may be, where its annotation says so."""
    try:
        return typing.get_args(typing.get_type_hints(entry_of(name).value).get(key))
    except Exception:  # annotations that mean nothing here, or none at all
        return ()


def _candidates(tree: ast.expr, names: tuple[str, ...]) -> Iterator[Activation]:
    """What the expression may be, with as few changed parameters as possible."""
    written = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    numbers = [float(n) for n in written if isinstance(n, (int, float))]
    numbers += [-n for n in numbers] + [1 / n for n in numbers if n]
    numbers = list(dict.fromkeys(numbers))[:_MOST_NUMBERS]
    found: list[tuple[int, Activation]] = []
    for name in names:
        activation = get_activation(name)
        if activation.operands:
            continue
        options = []
        for key, default in activation.parameters:
            is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
            others = numbers if is_number else _texts(name, key)
            options.append([(key, default), *((key, o) for o in others if o != default)])
        for chosen in itertools.islice(itertools.product(*options), 500):
            changed = sum(pair not in activation.parameters for pair in chosen)
            found.append((changed, Activation(name, chosen)))
    yield from (activation for _, activation in sorted(found, key=lambda pair: pair[0]))
