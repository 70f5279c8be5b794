"""Sources and targets: what an activation computes, and which torch calls mean it.

An activation is one entry in a registry: a value as differentiable tensor code, and the torch calls
that mean it. The built-in entries are in `builtin` and `handwritten`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.activations.expressions import function_of, names_in, parse

Value = Callable[..., Tensor]


@dataclass(frozen=True)
class _Entry:
    value: Value
    defaults: Mapping[str, Any]
    operands: tuple[str, ...]
    module: type[nn.Module] | None = None


_REGISTRY: dict[str, _Entry] = {}
CALLS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {}
_VARIANTS: dict[tuple[str, str], _Entry] = {}


@dataclass(frozen=True)
class Activation:
    """An element-wise function with its parameters, e.g. ``leaky_relu(negative_slope=0.2)``.

    It holds a registered name and parameter values only, so it is hashable and picklable, and
    ``str(activation)`` is accepted wherever an activation is asked for. The parameter ``variant``
    is another way to write the function, which rounds differently, such as ``"x * sigmoid(x)"``.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Tensor, *operands: Tensor) -> Tensor:
        """Value at ``x``, any shape and floating dtype; the result has the same shape."""
        entry = self._entry
        known = {k: v for k, v in self.parameters if k in entry.defaults}
        return entry.value(x, *operands, **known)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors that it takes besides its input, such as PReLU's ``weight``."""
        return self._entry.operands

    @property
    def _entry(self) -> _Entry:
        variant = dict(self.parameters).get("variant")
        return _variant(self.name, variant) if variant else _REGISTRY[self.name]

    def __reduce__(self) -> Any:
        return _restored, (self.name, self.parameters)  # which reads the variant, if it has one

    def __str__(self) -> str:
        changed = [f"{k}={_literal(v)}" for k, v in self.parameters if self._default(k) != v]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def _default(self, key: str) -> Any:
        return _REGISTRY[self.name].defaults.get(key)


def _literal(value: Any) -> str:
    """Text that `ast.literal_eval` reads back, which "inf" is not."""
    return repr(float(value)).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def register_activation(
    name: str,
    *,
    calls: Mapping[Callable[..., Any], tuple[str, ...]] | None = None,
    operands: tuple[str, ...] = (),
    module: type[nn.Module] | None = None,
) -> Callable[[Value], Value]:
    """Register ``value(x, *operands, **parameters)`` as an activation; a decorator.

    Args:
        name: the name used in ``convert(target=name)``, reports and checkpoints.
        calls: torch functions or tensor methods that mean this activation when a model calls
            them, each with the names of its positional arguments after the input.
        operands: names of tensors that the value takes after ``x``, such as a learned slope; an
            activation with operands can be a source, not a target.
        module: a module that computes the same bits and takes the parameters by name, such as
            ``nn.LeakyReLU``: what `bake` puts where this activation is left.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: the name is taken, or a parameter has no default.

    Examples:
        >>> import torch
        >>> @register_activation("docs_gaussian")
        ... def gaussian(x, width=1.0):
        ...     return torch.exp(-((x / width) ** 2))
        >>> get_activation("docs_gaussian", width=2.0)(torch.zeros(1))
        tensor([1.])
    """
    check_arguments(register_activation, locals())
    if name in _REGISTRY:
        raise ValueError(f"activation {name!r} is already registered; choose another name.")

    def decorate(value: Value) -> Value:
        parameters = list(inspect.signature(value).parameters.values())[1 + len(operands) :]
        missing = [p.name for p in parameters if p.default is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"activation {name!r}: give parameter {missing[0]!r} a default value.")
        defaults = {p.name: p.default for p in parameters}
        _REGISTRY[name] = _Entry(value, defaults, operands, module)
        for function, positional in (calls or {}).items():
            CALLS[function] = (name, positional)
        return value

    return decorate


def _variant(name: str, text: str) -> _Entry:
    """What a variant computes: the expression that its text is.

    Raises:
        ValueError: the text is no expression.
    """
    if (name, text) not in _VARIANTS:
        tree = parse(text, get_activation)
        known, names = _REGISTRY[name].defaults, list(dict.fromkeys(names_in(tree)))
        operands = tuple(n for n in names if n not in known and n != "x")
        value = function_of(tree, ("x", *operands), get_activation)
        _VARIANTS[name, text] = _Entry(value, {n: known[n] for n in names if n in known}, operands)
    return _VARIANTS[name, text]


def _restored(name: str, parameters: tuple[tuple[str, Any], ...]) -> Activation:
    if (variant := dict(parameters).get("variant")) and name in _REGISTRY:
        _variant(name, variant)
    return Activation(name, parameters)


def entry_of(name: str) -> _Entry:
    """What is registered under a name."""
    return _REGISTRY[name]


def registered_activations() -> tuple[str, ...]:
    """Names of all registered activations, sorted."""
    return tuple(sorted(_REGISTRY))


def registered_names() -> tuple[str, ...]:
    """The same in the order in which they were registered."""
    return tuple(_REGISTRY)


def get_activation(activation: str | Activation, **parameters: Any) -> Activation:
    """Look an activation up by name, e.g. ``"sin"`` or ``"snake(a=0.5)"``; parameters override.

    Raises:
        ValueError: unknown name or parameter; the message lists what is known.
    """
    if isinstance(activation, Activation):
        changed = dict(activation.parameters) | parameters
        return get_activation(activation.name, **changed) if parameters else activation
    match = re.fullmatch(r"\s*(\w+)\s*(\(.*\))?\s*", str(activation), flags=re.DOTALL)
    name = match.group(1) if match else str(activation)
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown activation {activation!r}. Known: {', '.join(registered_activations())}. "
            "Add your own with @register_activation(name)."
        )
    if match and match.group(2):
        parameters = _read_parameters(name, match.group(2)) | parameters
    defaults = _REGISTRY[name].defaults
    unknown = sorted(parameters.keys() - defaults.keys() - {"variant"})
    if "variant" in parameters:
        _variant(name, parameters["variant"])
    if unknown:
        raise ValueError(
            f"activation {name!r} has no parameter {unknown[0]!r}; it has: "
            f"{', '.join(defaults) or 'none'}."
        )
    for key in parameters.keys() & defaults.keys():
        if not is_of_kind(parameters[key], defaults[key]):
            raise ValueError(
                f"activation {name!r}: {key}={parameters[key]!r} cannot take the place of the "
                f"default {defaults[key]!r}."
            )
    return Activation(name, tuple((dict(defaults) | parameters).items()))


def is_of_kind(value: Any, default: Any) -> bool:
    """Whether a parameter is of the kind that its default is: a number, a text ..."""
    if isinstance(default, int | float):
        return isinstance(value, int | float) and value == value  # nan is no number
    return isinstance(value, int | float | None if default is None else type(default))


def get_target(target: str | Activation) -> Activation:
    """An activation to which a site can be transferred, after a trial.

    Raises:
        ValueError: it is unknown, needs more than its input, or does not compute.
    """
    activation = get_activation(target)
    if activation.operands:
        raise ValueError(
            f"{activation} takes {', '.join(activation.operands)} from the site of a network that "
            "has it; it can be a source, not a target."
        )
    try:
        with torch.device("cpu"), torch.no_grad():
            x = torch.linspace(-2, 2, 5)
            y = activation(x)
            computes = y.shape == x.shape and bool(y.isfinite().any())
    except Exception as error:  # what a wrong parameter leads to may be anything
        raise ValueError(
            f"the target {activation} cannot be computed: {type(error).__name__}: {error}"
        ) from error
    if not computes:
        raise ValueError(f"the target {activation} gives no finite numbers, or not one per input.")
    return activation


def _read_parameters(name: str, text: str) -> dict[str, Any]:
    """The parameters in ``"(a=0.5)"``; only ``key=value`` with literal values is accepted."""
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"cannot read activation {name + text!r}: write '{name}(parameter=value)'.")
