"""Adapters: what is special about a zoo. Packages announce them through entry points."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from transfer_surgery.sites.site import ROLES, Site


class Adapter:
    """Knows one zoo; a subclass says which models are its own, and of the rest what it needs.

    Announced in the entry point group ``transfer_surgery.adapters``. Paths are those of
    ``model.named_modules()``, sites those of `find_activations`. CONTRIBUTING.md has an example.
    """

    priority = 0
    """Adapters are asked from high to low; the generic one, which guesses, has -1."""

    def matches(self, model: nn.Module) -> bool:
        """Whether the model comes from this zoo."""
        raise NotImplementedError(f"{type(self).__name__} has to say which models it knows.")

    def example_input(self, model: nn.Module) -> Any:
        """A tensor, a tuple of arguments or a dict of keyword arguments; None: unknown.

        The model has to run on it in eval mode and in training mode.
        """
        return None

    def channel_axis(self, model: nn.Module, site: Site) -> int | None:
        """The axis of ``site.shape`` that holds the channels; None: as found."""
        return None

    def role(self, model: nn.Module, site: Site) -> str | None:
        """One of `transfer_surgery.sites.site.ROLES`; None: as found."""
        return None

    def leaf_types(self, model: nn.Module) -> tuple[type[nn.Module], ...]:
        """Types of modules to leave as they are: what they call is listed, not converted."""
        return ()

    def stages(self, model: nn.Module) -> Mapping[str, Iterable[str]]:
        """Module paths of each stage, in order; what lies below a path belongs to its stage.

        ``report(model, by="stage")`` sums up by them, and ``TransferSchedule(order=...)`` goes by
        them; the longest path counts, and modules below none go by the name of the model's child
        that they are in.
        """
        return {}

    def describe(self, model: nn.Module) -> bool:
        """Bring up to date what the zoo saves beside the weights: its activations have changed.

        `bake` asks this. Return whether there is such a description of the model; where there is
        none, adapters of the modules inside are asked.
        """
        return False


@cache
def _adapters() -> tuple[Adapter, ...]:
    entries = sorted(entry_points(group="transfer_surgery.adapters"), key=lambda entry: entry.name)
    loaded = [adapter for entry in entries if (adapter := _load(entry)) is not None]
    return tuple(sorted(loaded, key=lambda adapter: -adapter.priority))


def _load(entry: EntryPoint) -> Adapter | None:
    """The adapter of an entry point; None, with a warning, where its package is broken."""
    try:
        adapter = entry.load()()
        if not isinstance(adapter, Adapter):
            raise TypeError("it is no subclass of transfer_surgery.sites.Adapter")
    except Exception as error:
        warnings.warn(
            f"adapter {entry.name} ({entry.value}) is left out: {type(error).__name__}: {error}. "
            "Repair or uninstall the package that announces it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return adapter


def find_adapter(model: nn.Module) -> Adapter | None:
    """The first adapter that knows the model, or None."""
    return next((adapter for adapter in _adapters() if adapter.matches(model)), None)


def describe_baked(model: nn.Module) -> None:
    """Let adapters bring up to date what their zoos save beside the weights of a baked model."""
    done: set[nn.Module] = set()
    for module in model.modules():  # outer ones come first
        adapter = None if module in done else find_adapter(module)
        if adapter is not None and adapter.describe(module):
            done.update(module.modules())


def find_example_input(model: nn.Module) -> Any:
    """The example input of the first adapter that has one for the model.

    Raises:
        ValueError: no adapter has one; the message says what to pass instead.
    """
    for adapter in _adapters():
        if adapter.matches(model):
            example = adapter.example_input(model)
            if example is not None:
                return example
    raise ValueError(
        f"{type(model).__name__} (module {type(model).__module__}): no zoo adapter knows its "
        "input. Pass example_input=: a tensor such as torch.zeros(2, 3, 224, 224), a tuple of "
        "positional arguments or a dict of keyword arguments."
    )


def stages_of(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The stage that each path belongs to, see `Adapter.stages`."""
    adapter = find_adapter(model)
    stages = {} if adapter is None else adapter.stages(model)
    stage_of = {path: stage for stage, members in stages.items() for path in members}
    found = {}
    for path in paths:
        names = path.split(".")
        prefixes = (".".join(names[:depth]) for depth in range(len(names), 0, -1))
        found[path] = next((stage_of[p] for p in prefixes if p in stage_of), names[0])
    return found


def adapt_sites(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The sites with the roles, channel axes and leaves that the model's adapter says.

    Raises:
        ValueError: an adapter gives a role or an axis that does not exist.
    """
    adapter = find_adapter(model)
    if adapter is None:
        return list(sites)
    types = adapter.leaf_types(model)
    leaves = {path: m for path, m in model.named_modules() if isinstance(m, types)}
    return [_adapt(adapter, model, site, leaves) for site in sites]


def _adapt(adapter: Adapter, model: nn.Module, site: Site, leaves: Mapping[str, nn.Module]) -> Site:
    name, dims = type(adapter).__name__, len(site.shape)
    role, axis = adapter.role(model, site), adapter.channel_axis(model, site)
    if role is not None and role not in ROLES:
        raise ValueError(
            f"{name} gives {site.path} the role {role!r}; known roles: {', '.join(ROLES)}."
        )
    if axis is not None and not (-dims < axis < dims and axis != 0):
        raise ValueError(
            f"{name} gives {site.path} the channel axis {axis}; its input is {site.shape}, batch "
            f"first: expected 1 to {dims - 1}, or -1 to {1 - dims}."
        )
    paths = (site.caller, site.module or site.caller)
    inside = next((leaf for leaf in leaves if any(_is_below(p, leaf) for p in paths)), None)
    reason = None if inside is None else f"{name} leaves {type(leaves[inside]).__name__} as it is"
    return replace(
        site,
        role=role or site.role,
        channel_axis=site.channel_axis if axis is None else axis,
        reason=site.reason or reason,
    )


def _is_below(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")
