"""The tensors in a value of any kind: in lists, dicts, and attributes of objects."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A value with other tensors in it, in lists, dicts, and attributes of objects.

    What has none in it, or keeps all of its tensors, is returned as it is; other objects are
    copied.

    Args:
        function: makes the new tensor; the old one stays where it returns that one, or None.
        value: a tensor, a tree of them, or objects that hold some, such as graphs.

    Examples:
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(x=torch.ones(2), edges=[(0, 1)])
        >>> map_tensors(lambda x: 2 * x, {"graphs": [graph]})["graphs"][0].x, graph.x
        (tensor([2., 2.]), tensor([1., 1.]))
    """
    return _Mapping(function).of(value)


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds by name; also a dataclass with slots."""
    attributes = dict(getattr(value, "__dict__", {}))
    if is_dataclass(value):
        attributes |= {f.name: getattr(value, f.name) for f in fields(value)}
    return attributes


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor other values, also one that was made in `torch.inference_mode`."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def check_learns(model: nn.Module) -> None:
    """Raise where no gradients can pass a model.

    Raises:
        ValueError: a tensor was made in `torch.inference_mode`.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"{name} was made in torch.inference_mode, so that no gradients can pass it: go on "
                "with copy.deepcopy(model), which you call outside of inference_mode."
            )


class _Mapping:
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function
        self._done: dict[int, tuple[Any, Any]] = {}  # what refers to itself is looked at once

    def of(self, value: Any) -> Any:
        if id(value) not in self._done:
            self._done[id(value)] = (value, value)
            self._done[id(value)] = (value, self._new(value))
        return self._done[id(value)][1]

    def _new(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            new = self._function(value)
            return value if new is None else new
        if isinstance(value, type | nn.Module | ModuleType) or callable(value):
            return value
        if isinstance(value, Mapping):
            parts = {key: self.of(part) for key, part in value.items()}
            if all(parts[key] is part for key, part in value.items()):
                return value
            new = copy.copy(value)
            for key, part in parts.items():
                new[key] = part  # type: ignore[index]
            return new
        if isinstance(value, list | tuple):
            items = [self.of(part) for part in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            named = hasattr(value, "_fields")
            return type(value)(*items) if named else type(value)(items)
        attributes = attributes_of(value)
        changed = {k: new for k, part in attributes.items() if (new := self.of(part)) is not part}
        if changed:
            value = copy.copy(value)
            for name, part in changed.items():
                object.__setattr__(value, name, part)  # also of a frozen dataclass
        return value
