"""The units of a converted model, and the one way to choose among units or sites by patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.units.gated_activation import GatedActivation

Item = TypeVar("Item")
_SHOWN = 20


def gated_activations(model: nn.Module) -> Iterator[tuple[str, GatedActivation]]:
    """Yield ``(path, unit)`` for each gated activation of a model, each unit once.

    Raises:
        ValueError: the model has none, that is, it was not converted.
        TypeError: it is no module.
    """
    if not torch.compiler.is_compiling():
        check_arguments(gated_activations, {"model": model})
    found = False
    for path, module in model.named_modules():
        if isinstance(module, GatedActivation):
            found = True
            yield path, module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated activations: call convert(model, ...) first."
        )


def check_gates_not_flattened(units: Mapping[str, GatedActivation]) -> None:
    """Raise where a rank holds a part of the gates of a unit, and does not know of the others.

    Gates that FSDP2 shards are whole: their tensors can be gathered.

    Raises:
        ValueError: the gates of a unit were flattened or cut.
    """
    for path, unit in units.items():
        if not unit.gate.learned:
            continue
        if "log_alpha" not in unit.gate._parameters:
            found = "is no parameter of its own any more"
        elif unit.log_alpha.shape != unit.gate.shape:
            shape = tuple(unit.log_alpha.shape)
            found = f"has the shape {shape} instead of {unit.gate.shape}"
        else:
            continue
        raise ValueError(
            f"{path}: log_alpha {found}. FSDP 1 and ZeRO-3 flatten parameters; use fully_shard "
            "(FSDP2) or DDP, and convert before."
        )


def stage_of(path: str, unit: GatedActivation) -> str:
    """The stage that a model's adapter named; where none did, the model's child that it is in."""
    return unit.stage or path.split(".")[0]


def matches_glob(path: str, glob: str) -> bool:
    """Whether a glob selects a path, or a module that the path lies in.

    Examples:
        >>> matches_glob("layer1.0.relu_0", "layer1"), matches_glob("layer10.relu_0", "layer1")
        (True, False)
    """
    return fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"{glob}.*")


def is_selected(path: str, item: Any, pattern: Any, types: tuple[type, ...]) -> bool:
    """Whether a glob on paths, a module type or a predicate selects a unit or a site.

    Args:
        path: where it lives.
        item: what a predicate is asked about.
        pattern: the glob, type or predicate.
        types: what a module type is compared with.
    """
    if isinstance(pattern, str):
        return matches_glob(path, pattern)
    if isinstance(pattern, type):
        return any(issubclass(one, pattern) for one in types)
    return bool(pattern(item))


def as_patterns(patterns: Any, model: nn.Module | None = None) -> tuple[Any, ...]:
    """One or several patterns as a tuple; modules of a model become their paths.

    Raises:
        ValueError: a module is not part of the model.
        TypeError: something is no pattern.
    """
    single = isinstance(patterns, str | type | nn.Module) or not isinstance(patterns, Iterable)
    found = []
    for pattern in (patterns,) if single else patterns:
        if isinstance(pattern, nn.Module):
            paths = {} if model is None else {m: path for path, m in model.named_modules()}
            if pattern not in paths:
                raise ValueError(
                    f"the pattern {type(pattern).__name__}(...) is not a module of the model; "
                    "give one of its modules, or a path."
                )
            pattern = paths[pattern] or "*"
        if not (isinstance(pattern, str | type) or callable(pattern)):
            raise TypeError(
                f"{pattern!r} is no pattern: give a glob on paths, a module type, a module of the "
                "model, or a function of a site."
            )
        found.append(pattern)
    return tuple(found)


def select(
    items: Mapping[str, Item],
    include: Any,
    exclude: Any,
    types_of: Callable[[str], tuple[type, ...]],
    model: nn.Module | None = None,
) -> dict[str, Item]:
    """Choose among units or sites by patterns.

    Args:
        items: what there is, by path.
        include: a pattern, or several: a glob on paths (``"layer1"`` selects all below it), a
            module type, a module of the model (all below it), or a predicate; None: all.
        exclude: patterns of what is left out; None: nothing.
        types_of: the types that a module type is compared with, for a path.
        model: what the modules among the patterns are parts of.

    Raises:
        ValueError: a pattern selects nothing.
    """
    chosen = dict(items)
    for name, patterns, wanted in (("include", include, True), ("exclude", exclude, False)):
        if patterns is None:
            continue
        hits: set[str] = set()
        for pattern in as_patterns(patterns, model):
            found = {p for p, i in items.items() if is_selected(p, i, pattern, types_of(p))}
            if not found:
                known = ", ".join([*items][:_SHOWN])
                raise ValueError(
                    f"{name}={pattern!r} matches none of the {len(items)} sites: {known}"
                )
            hits |= found
        chosen = {path: item for path, item in chosen.items() if (path in hits) == wanted}
    return chosen


def select_units(
    model: nn.Module, include: Any = None, exclude: Any = None
) -> dict[str, GatedActivation]:
    """The gated activations of a model that patterns select, by path.

    Args:
        model: a converted model.
        include: a glob on paths (``"layer1"`` includes all below it), a type (of the module that
            holds the unit, or of the activation module it replaced), a module of the model, a
            predicate on a unit, or several of them; None: all.
        exclude: units to leave out; the same forms.

    Raises:
        ValueError: the model is not converted, a pattern matches nothing, or nothing is left.
    """
    units = dict(gated_activations(model))

    def types_of(path: str) -> tuple[type, ...]:
        caller = model.get_submodule(path.rpartition(".")[0])
        return type(caller), *(type(module) for module in units[path].replaced)

    chosen = select(units, include, exclude, types_of, model)
    if not chosen:
        raise ValueError(f"no site is left: include={include!r}, exclude={exclude!r}.")
    return chosen
