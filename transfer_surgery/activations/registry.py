"""Sources and targets: what an activation computes, and how a call of it looks.

An activation is one entry in a registry: a value as differentiable tensor code, and the torch calls
that mean it. The built-in entries are in `builtin` and `handwritten`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from transfer_surgery._arguments import check_arguments
from transfer_surgery.activations.operators import argument_names_of, functions_of, name_of

Value = Callable[..., Tensor]


@dataclass(frozen=True)
class _Entry:
    value: Value
    defaults: Mapping[str, Any]
    operands: tuple[str, ...]
    module: type[nn.Module] | None = None


_REGISTRY: dict[str, _Entry] = {}
_CALLS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {}
_VARIANTS: dict[tuple[str, str], _Entry] = {}
_READERS: list[Callable[[str], Value]] = []


@dataclass(frozen=True)
class Activation:
    """An element-wise function with its parameters, e.g. ``leaky_relu(negative_slope=0.2)``.

    It holds a registered name and parameter values only, so it is hashable and picklable, and
    ``str(activation)`` is accepted wherever an activation is asked for. The parameter ``variant``
    names another way to write the function, which rounds differently; see `register_variant`.
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

    def __str__(self) -> str:
        changed = [f"{k}={_literal(v)}" for k, v in self.parameters if self._default(k) != v]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def _default(self, key: str) -> Any:
        return _REGISTRY[self.name].defaults.get(key)


def _literal(value: Any) -> str:
    """Text that `ast.literal_eval` reads back, which "inf" is not."""
    return repr(float(value)).replace("inf", "1e999") if isinstance(value, float) else repr(value)


class ActivationModule(nn.Module):
    """A plain module for one activation: what a fully transferred site is baked to.

    Where the activation is plain tensor code, so is the module: it can be traced, also by
    `torch.fx`, scripted and exported.

    Examples:
        >>> import torch
        >>> ActivationModule("sin")(torch.zeros(2))
        tensor([0., 0.])
    """

    def __init__(self, activation: str | Activation) -> None:
        super().__init__()
        self.activation = get_activation(activation)
        self.value = _with_parameters(self.activation)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.value(input)
        return _activate(input, self.activation)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "value"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.value = _with_parameters(self.activation)

    def extra_repr(self) -> str:
        return str(self.activation)


class _OperandModule(ActivationModule):
    """An activation that takes further tensors, such as PReLU's slope, from the site."""

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        return _activate(input, self.activation, *operands)


def _with_parameters(activation: Activation) -> Value:
    """The activation's value as a function of the input, in a form that torch.jit.script takes."""
    entry = activation._entry
    known = dict(entry.defaults) | dict(activation.parameters)
    value = entry.value
    if not isinstance(value, FunctionType):
        return value
    defaults = tuple(known[name] for name in entry.defaults)
    own: Any = FunctionType(
        value.__code__, value.__globals__, value.__name__, defaults, value.__closure__
    )
    own.__annotations__, own.__module__ = value.__annotations__, value.__module__
    own.__qualname__ = value.__qualname__
    result: Value = own
    return result


def activation_module(activation: str | Activation) -> nn.Module:
    """The plain module of an activation: torch's own where there is one.

    Tools that go by type (quantisation, fusion, attribution) know that one.

    Examples:
        >>> activation_module("leaky_relu(negative_slope=0.2)"), activation_module("sin")
        (LeakyReLU(negative_slope=0.2), ActivationModule(sin))
    """
    activation = get_activation(activation)
    module, parameters = activation._entry.module, dict(activation.parameters)
    if activation.operands:
        return _OperandModule(activation)
    if module is None or "variant" in parameters:  # a variant rounds differently
        return ActivationModule(activation)
    return module(**parameters)


def _activate(x: Tensor, activation: Activation, *operands: Tensor) -> Tensor:
    """One torch call, as far as the finder can see, whatever the activation consists of."""
    # Tensors of other kinds, such as the proxies of torch.fx, see what it consists of.
    if torch._C._is_torch_function_mode_enabled():
        result: Tensor = handle_torch_function(_activate, (x,), x, activation, *operands)
        return result
    return activation(x, *operands)


class Call(NamedTuple):
    """A recognised call: the activation, its input, whether it overwrites that, its operands."""

    activation: Activation
    input: Any
    inplace: bool
    operands: tuple[Any, ...] = ()


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
            _CALLS[function] = (name, positional)
        return value

    return decorate


def register_variant(name: str, variant: str, value: Value, operands: tuple[str, ...] = ()) -> None:
    """Register another way to write an activation: the same function, rounded differently.

    Args:
        name: a registered activation.
        variant: how it is written, e.g. ``"x * sigmoid(x)"``. Plans and reports show it.
        value: ``value(x, *operands, **parameters)``, with parameters of that activation.
        operands: names of the tensors that it takes after ``x``.
    """
    known = _REGISTRY[name].defaults
    used = [p for p in inspect.signature(value).parameters if p in known]
    _VARIANTS[name, variant] = _Entry(value, {p: known[p] for p in used}, operands)


def read_variants(reader: Callable[[str], Value]) -> Callable[[str], Value]:
    """Let a function make the value of a variant from its text; a decorator.

    A network may come from another process, where a variant was found in its code.
    """
    _READERS.append(reader)
    return reader


def _variant(name: str, text: str) -> _Entry:
    for reader in _READERS if (name, text) not in _VARIANTS else ():
        register_variant(name, text, reader(text))
    return _VARIANTS[name, text]


def called_activations() -> tuple[str, ...]:
    """Names of the activations that have a torch call, the usual ones first."""
    return tuple(dict.fromkeys(name for name, _ in _CALLS.values()))


def registered_activations() -> tuple[str, ...]:
    """Names of all registered activations, sorted."""
    return tuple(sorted(_REGISTRY))


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
    try:
        if "variant" in parameters:
            _variant(name, parameters["variant"])
    except (SyntaxError, ValueError, KeyError):
        known = [text for activation, text in _VARIANTS if activation == name]
        raise ValueError(
            f"activation {name!r} has no variant {parameters['variant']!r}; it has: "
            f"{', '.join(known) or 'none'}."
        ) from None
    if unknown:
        raise ValueError(
            f"activation {name!r} has no parameter {unknown[0]!r}; it has: "
            f"{', '.join(defaults) or 'none'}."
        )
    for key in parameters.keys() & defaults.keys():
        if not _fits(parameters[key], defaults[key]):
            raise ValueError(
                f"activation {name!r}: {key}={parameters[key]!r} cannot take the place of the "
                f"default {defaults[key]!r}."
            )
    return Activation(name, tuple((dict(defaults) | parameters).items()))


def _fits(value: Any, default: Any) -> bool:
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


def recognise(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Read a torch call as an activation, or return None where it is none.

    Args:
        function: what was called, e.g. ``F.relu``, ``torch.tanh``, ``torch.Tensor.sigmoid_``.
        args: its positional arguments; the first one is the input.
        kwargs: its keyword arguments.
    """
    if function is _activate:
        return Call(args[1], args[0], False, tuple(args[2:]))
    found = _known_call(function)
    if found is None:
        return None
    name, positional = found
    given = dict(zip(positional, args[1:], strict=False)) | dict(kwargs)
    x = args[0] if args else given.pop("input", given.pop("self", None))
    inplace = bool(given.pop("inplace", False)) or name_of(function).endswith("_")
    given.pop("out", None)
    entry = _REGISTRY[name]
    if functions_of(function) and not given.keys() <= {*entry.defaults, *entry.operands}:
        return None  # operators have arguments that no function of torch's has
    chosen = {k: v for k, v in given.items() if k in entry.defaults}
    if not all(_fits(value, entry.defaults[name]) for name, value in chosen.items()):
        return None  # bounds or slopes that are computed: no fixed function
    activation = _common_name(get_activation(name, **chosen))
    if activation is None:
        return None
    return Call(activation, x, inplace, tuple(given.get(name) for name in entry.operands))


def _common_name(activation: Activation) -> Activation | None:
    """ReLU and its like in the disguise of a clamp; None for clamps that are no activation."""
    parameters = dict(activation.parameters)
    bounds = parameters.get("min_val"), parameters.get("max_val")
    if activation.name == "hardtanh" and bounds == (0, 6):
        return get_activation("relu6")  # nn.ReLU6 is a Hardtanh and calls F.hardtanh
    if activation.name == "threshold" and not any(parameters.values()):
        return get_activation("relu")
    if activation.name == "clamp":
        bounds = parameters["min"], parameters["max"]
        if bounds == (0, None):
            return get_activation("relu", variant="clamp(x, 0)")
        if bounds == (0, 6):
            return get_activation("relu6", variant="clamp(x, 0, 6)")
        if None in bounds:
            return None
    return activation


def argument_names(function: Any) -> tuple[str, ...]:
    """Names of the positional arguments after the input of a call that means an activation."""
    found = _known_call(function)
    return () if found is None else found[1]


def registered_name(function: Any) -> str | None:
    """Name of the activation that calls of a torch function may mean."""
    found = _known_call(function)
    return None if found is None else found[0]


def _known_call(function: Any) -> tuple[str, tuple[str, ...]] | None:
    """The activation that a call may mean, and the names of its positional arguments."""
    try:
        found = _CALLS.get(function)
    except TypeError:  # an unhashable callable is none of ours
        return None
    if found is None:
        known = next((_CALLS[one] for one in functions_of(function) if one in _CALLS), None)
        return None if known is None else (known[0], argument_names_of(function) or known[1])
    return found
