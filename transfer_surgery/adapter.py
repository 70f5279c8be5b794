"""Adapters: what is special about a zoo. Packages announce them through entry points."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import nn

__all__ = ["Adapter", "find_adapter", "find_example_input"]


class Adapter(Protocol):
    """Knows one zoo; announced in the entry point group ``transfer_surgery.adapters``."""

    def matches(self, model: nn.Module) -> bool:
        """Whether the model comes from this zoo."""
        ...

    def example_input(self, model: nn.Module) -> Any:
        """A tensor, tuple of arguments or dict of keyword arguments that the model accepts."""
        ...


@cache
def _adapters() -> tuple[Adapter, ...]:
    return tuple(entry.load()() for entry in entry_points(group="transfer_surgery.adapters"))


def find_adapter(model: nn.Module) -> Adapter | None:
    """The first adapter that knows the model, or None."""
    return next((adapter for adapter in _adapters() if adapter.matches(model)), None)


def find_example_input(model: nn.Module) -> Any:
    """The example input that the model's adapter supplies.

    Raises:
        ValueError: no adapter knows the model; the message says what to pass instead.
    """
    adapter = find_adapter(model)
    if adapter is None:
        raise ValueError(
            f"{type(model).__name__} (module {type(model).__module__}) belongs to no known zoo, so "
            "its input size is unknown. Pass example_input=: a tensor such as "
            "torch.zeros(2, 3, 224, 224), a tuple of positional arguments or a dict of keyword "
            "arguments."
        )
    return adapter.example_input(model)
