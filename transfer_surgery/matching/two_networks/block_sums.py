"""Sums that the output of a layer goes into: the shortcuts of residual blocks.

Between the layer and the sum there may be calls that pass its output on, such as a batch norm, a
scale or a change of the layout. Which sums there are is seen in one run of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from transfer_surgery._tensors import map_tensors

_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


class Step(NamedTuple):
    """A call that passes a tensor on; `place` is where it goes in the arguments."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def __call__(self, tensor: Tensor) -> Any:
        """The same call of another tensor."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = tensor
        else:
            kwargs[self.place] = tensor
        return self.func(*args, **kwargs)


@dataclass
class Chain:
    """What became of an output of a layer until now.

    Attributes:
        layer: the layer.
        args: its arguments.
        start: its output.
        steps: the calls that passed the output on.
        summand: what the last of them gave.
    """

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: Tensor
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.summand = self.start

    def pass_on(self, output: Tensor) -> Tensor:
        """What the steps make of another output of the layer."""
        for step in self.steps:
            output = step(output)
        return output

    def renewed(self) -> Tensor:
        """The summand with the weights that the layer has now."""
        with torch.set_grad_enabled(self.summand.requires_grad):
            return self.pass_on(self.layer.forward(*self.args, **self.kwargs)).to(self.summand)


def other_summand(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], summand: Tensor
) -> Tensor | None:
    """The tensor that a call adds to another one of its shape; None if that is not what it does."""
    if func not in _SUMS or kwargs.get("alpha", 1) != 1:
        return None
    values = [*args, *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    others = [x for x in values if isinstance(x, Tensor) and x is not summand]
    return others[0] if len(others) == 1 and others[0].shape == summand.shape else None


class SumFollower(TorchFunctionMode):
    """Follows the outputs of layers to their sums.

    Args:
        at_sum: called before the sum is made, with the chain and the other summand. It returns what
            is added in place of the summand.
    """

    def __init__(self, at_sum: Callable[[Chain, Tensor], Tensor]) -> None:
        super().__init__()
        self._at_sum = at_sum
        self._chain: Chain | None = None

    def follow(self, chain: Chain) -> None:
        """Follow an output from now on, and no other one."""
        self._chain = chain

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, chain = kwargs or {}, self._chain
        place = None if chain is None else _place(args, kwargs, chain.summand)
        if chain is None or place is None:
            return func(*args, **kwargs)
        other = other_summand(func, args, kwargs, chain.summand)
        if other is not None:
            self._chain = None
            summand = self._at_sum(chain, other)
            result = _step(func, args, kwargs, place)(summand)
            # A sum in place is also there for who holds the tensor that it is written into.
            in_place = result is summand and summand is not chain.summand
            return chain.summand.copy_(result) if in_place else result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result is not chain.summand:
            chain.steps.append(_step(func, args, kwargs, place))
            chain.summand = result
        return result


def _step(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> Step:
    """Without the tensor, which would be held until the sum."""
    free = [None if at == place else value for at, value in enumerate(args)]
    return Step(func, tuple(free), {k: v for k, v in kwargs.items() if k != place}, place)


def _place(args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> int | str | None:
    at = next((i for i, value in enumerate(args) if value is tensor), None)
    return next((name for name, value in kwargs.items() if value is tensor), at)


class _Followed(NamedTuple):
    layer: nn.Module
    tensor: weakref.ref[Tensor]
    version: int  # of the tensor when it was made
    was_read: bool = False


class SumSearch:
    """Finds the layers each of whose outputs goes into one sum and nowhere else, in one run.

    No other module that is fitted may run between the layer and the sum: the last one of the layers
    that are added up can make up for the errors of the others.

    Args:
        layers: the layers in question.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = set(layers)
        self.found: set[nn.Module] = set()
        self._called: set[nn.Module] = set()
        self._open: nn.Module | None = None  # the layer whose output may still come to a sum
        self._kept: list[tuple[Tensor, int]] = []  # what it got and gave
        self._followed: dict[int, _Followed] = {}

    def begin(self, module: nn.Module) -> None:
        """A module that is fitted is called."""
        self._open, self._kept = None, []
        if module in self._called:
            self.found.discard(module)
            self._layers.discard(module)
        self._called.add(module)

    def end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Such a module returns."""
        if module in self._layers and isinstance(output, Tensor):
            self._open = module
            self._kept = [(x, _version(x)) for x in _tensors((arguments, output))]
            self._follow(output, module)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """A function was called; whether it made a sum that a layer can be fitted to."""
        found = len(self.found)
        for leaf in _tensors((args, kwargs)):
            seen = self._followed.get(id(leaf))
            if seen is None or seen.tensor() is not leaf:
                continue
            in_place = result is leaf
            if in_place and _version(leaf) == seen.version:
                continue  # as dropout in evaluation: nothing was done
            self._followed[id(leaf)] = seen._replace(was_read=True)
            passes_on = isinstance(result, Tensor) and not in_place
            if seen.was_read or self._open is not seen.layer or not self._is_kept(result):
                self._end(seen.layer)
            elif other_summand(func, args, kwargs, leaf) is not None:
                self.found.add(seen.layer)
                self._open, self._kept = None, []
                if in_place:  # from now on this tensor is the sum
                    del self._followed[id(leaf)]
            elif passes_on and any(x is leaf for x in (*args, *kwargs.values())):
                self._follow(result, seen.layer)
            else:
                self._end(seen.layer)
        return len(self.found) > found

    def _is_kept(self, result: Any) -> bool:
        """Whether nothing has written into what the layer got and gave, but the call itself."""
        return all(_version(x) == version + (result is x) for x, version in self._kept)

    def returned(self, output: Any) -> None:
        """What the model returns is read by its caller."""
        map_tensors(lambda x: self.call(None, (x,), {}, None), output)

    def _follow(self, tensor: Tensor, layer: nn.Module) -> None:
        self._followed[id(tensor)] = _Followed(layer, weakref.ref(tensor), _version(tensor))

    def _end(self, layer: nn.Module) -> None:
        self.found.discard(layer)
        if self._open is layer:
            self._open, self._kept = None, []


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
