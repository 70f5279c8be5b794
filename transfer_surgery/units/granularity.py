"""Which elements of an input share a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from transfer_surgery._messages import check_arguments


@dataclass(frozen=True)
class Granularity:
    """Base class of `PerLayer`, `PerChannel` and `PerNeuron`."""

    name: ClassVar[str]
    """The short form in ``convert(granularity=name)``."""

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))

    def axes(self, dims: int) -> tuple[int, ...]:
        """The axes of an input with that many dimensions along which gates differ."""
        raise NotImplementedError

    def gate_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the gates for inputs of a shape, whose first axis holds the examples."""
        return tuple(shape[axis] for axis in self.axes(len(shape))) or (1,)

    def expand(self, values: Tensor, x: Tensor) -> Tensor:
        """View one value per gate, with or without an axis of examples, so that it broadcasts.

        Examples:
            >>> import torch
            >>> PerChannel(1).expand(torch.zeros(3), torch.zeros(2, 3, 4, 4)).shape
            torch.Size([3, 1, 1])
        """
        sizes, axes = [1] * x.dim(), self.axes(x.dim())
        if axes and values.dim() == len(axes):
            return align(values, self.trailing(x.dim()))
        for axis, size in zip(axes, values.shape[values.dim() - len(axes) :], strict=True):
            sizes[axis] = size
        if sizes and values.dim() > len(axes):
            sizes[0] = values.shape[0]
        return values.reshape(sizes)

    def trailing(self, dims: int) -> int:
        """How many axes values of gates lack behind to broadcast to inputs with so many dimensions.

        Examples:
            >>> PerChannel(1).trailing(4), PerNeuron().trailing(4), PerLayer().trailing(0)
            (2, 0, -1)
        """
        if not dims:
            return -1
        return dims - 1 - max(self.axes(dims), default=dims - 1)

    def group(self, x: Tensor) -> Tensor:
        """Lay the elements that share a gate beside each other, as ``(gates, N)``.

        Examples:
            >>> import torch
            >>> PerChannel(1).group(torch.zeros(2, 3, 4, 5)).shape
            torch.Size([3, 40])
        """
        axes, gates = self.axes(x.dim()), math.prod(self.gate_shape(x.shape))
        return x.movedim(axes, tuple(range(len(axes)))).reshape(gates, -1)

    def to_dict(self) -> dict[str, Any]:
        """The name and the axis, if any, as JSON can hold them; see `granularity_of`."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PerLayer(Granularity):
    """All elements of a site share one gate."""

    name = "layer"

    def axes(self, dims: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class PerChannel(Granularity):
    """Each channel has a gate.

    Args:
        axis: the axis of the channels in the input, whose axis 0 holds the examples. In `convert`
            it overrides the axis that was found.
        found: whether `convert` found the axis. `load_gates` then compares it with the axis that
            it finds; one that was given is used again.
    """

    name = "channel"
    axis: int
    found: bool = field(default=False, compare=False, repr=False)

    def axes(self, dims: int) -> tuple[int, ...]:
        axis = self.axis + dims if self.axis < 0 else self.axis
        return (axis,) if 0 <= axis < dims else ()


@dataclass(frozen=True)
class PerNeuron(Granularity):
    """Each element of the feature shape has a gate, which the examples share."""

    name = "neuron"

    def axes(self, dims: int) -> tuple[int, ...]:
        return tuple(range(1, dims))


def align(values: Tensor, trailing: int) -> Tensor:
    """Values with so many axes of size 1 behind; with one axis less where that is -1.

    Written such that fx, TorchScript and pruners follow: without sizes.
    """
    if trailing < 0:
        return values.squeeze(0)
    for _ in range(trailing):
        values = values.unsqueeze(-1)
    return values


def granularity_of(
    granularity: str | Granularity | Mapping[str, Any], axis: int = 1
) -> Granularity:
    """The granularity that a short form, or `Granularity.to_dict`, stands for.

    Args:
        granularity: an object, which is returned as it is; ``"layer"``, ``"channel"`` or
            ``"neuron"``; or a dict.
        axis: the axis of the channels that ``"channel"`` means.

    Raises:
        ValueError: there is no such granularity, or the axis is not an int.

    Examples:
        >>> granularity_of("channel", axis=-1)
        PerChannel(axis=-1)
        >>> granularity_of({"name": "neuron"})
        PerNeuron()
    """
    if isinstance(granularity, Granularity):
        return granularity
    if isinstance(granularity, type):
        raise ValueError(f"granularity={granularity.__name__}: a class; write an object of it.")
    found = True
    if isinstance(granularity, Mapping):
        axis, found = granularity.get("axis", axis), granularity.get("found", False)
        granularity = str(granularity.get("name"))
    known = {"layer": PerLayer(), "channel": PerChannel(axis, found), "neuron": PerNeuron()}
    if granularity not in known:
        raise ValueError(
            f"unknown granularity {granularity!r}; known: {', '.join(known)}, or PerLayer(), "
            "PerChannel(axis), PerNeuron()."
        )
    return known[granularity]
