"""Which torch calls mean an activation by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transfer_surgery.activations.modules import activate
from transfer_surgery.activations.operators import argument_names_of, functions_of, name_of
from transfer_surgery.activations.registry import (
    CALLS,
    Activation,
    entry_of,
    get_activation,
    is_of_kind,
)


class Call(NamedTuple):
    """A recognised call: the activation, its input, whether it overwrites that, its operands.

    `written` is the activation that the called function is registered for.
    """

    activation: Activation
    input: Any
    inplace: bool
    operands: tuple[Any, ...] = ()
    written: Activation | None = None


def recognise(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Read a torch call as an activation, or return None where it is none.

    Args:
        function: what was called, e.g. ``F.relu``, ``torch.tanh``, ``torch.Tensor.sigmoid_``.
        args: its positional arguments; the first one is the input.
        kwargs: its keyword arguments.
    """
    if function is activate:
        return Call(args[1], args[0], False, tuple(args[2:]))
    found = _known_call(function)
    if found is None or kwargs.get("out") is not None:  # what it is written into may be anybody's
        return None
    name, positional = found
    given = dict(zip(positional, args[1:], strict=False)) | dict(kwargs)
    x = args[0] if args else given.pop("input", given.pop("self", None))
    inplace = bool(given.pop("inplace", False)) or name_of(function).endswith("_")
    entry = entry_of(name)
    if functions_of(function) and not given.keys() <= {*entry.defaults, *entry.operands}:
        return None  # operators have arguments that no function of torch's has
    chosen = {k: v for k, v in given.items() if k in entry.defaults}
    if not all(is_of_kind(value, entry.defaults[name]) for name, value in chosen.items()):
        return None  # bounds or slopes that are computed: no fixed function
    written = get_activation(name, **chosen)
    activation = _common_name(written)
    if activation is None:
        return None
    return Call(activation, x, inplace, tuple(map(given.get, entry.operands)), written)


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
            return get_activation("relu", variant="clamp(x, min=0)")
        if bounds == (0, 6):
            return get_activation("relu6", variant="clamp(x, min=0, max=6)")
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
        found = CALLS.get(function)
    except TypeError:  # an unhashable callable is none of ours
        return None
    if found is None:
        known = next((CALLS[one] for one in functions_of(function) if one in CALLS), None)
        return None if known is None else (known[0], argument_names_of(function) or known[1])
    return found
