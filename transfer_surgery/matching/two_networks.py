"""A converted model run as the original network, or with some sites at their targets, on batches.

Runs go up to the module that is looked at and no further. Nothing of the model is changed for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._running import call_model, log_probabilities, logits_of
from transfer_surgery.units import Gate, GatedActivation

Seen = list[tuple[Tensor, Tensor]]
"""Input and output of each call of a module."""


class SideBySide:
    """Both networks that a converted model can be.

    Args:
        model: the converted model.
        units: the sites that are to be matched.
        batches: what it is called with: tensors, tuples of arguments or dicts of keyword arguments.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[GatedActivation], batches: Sequence[Any]
    ) -> None:
        self.model, self.batches = model, batches
        self.every = [module for module in model.modules() if isinstance(module, GatedActivation)]
        self.chosen = list(units)
        self.swapped: set[GatedActivation] = set()
        self.partly = {
            unit: z for unit in self.chosen if (z := _partly_transferred(unit)) is not None
        }
        """Units some of whose gates are to stay at their source, with the values of their gates."""
        self.refitted: dict[nn.Module, dict[str, Tensor]] = {}
        """Modules whose weights have changed, with their original ones."""

    @contextmanager
    def original(self) -> Iterator[None]:
        """Run as the network that was converted: all units at their source, original weights."""
        with _held(dict.fromkeys(self.every, 1.0)), _with_values(self.refitted):
            yield

    @contextmanager
    def matched(self) -> Iterator[None]:
        """Run with the sites of `swapped` at their target, others to be matched at their source.

        Of those of `partly` some gates stay at the source; units that are not to be matched are as
        their gates have it.
        """
        with _held(
            {
                unit: self.partly.get(unit, 0.0) if unit in self.swapped else 1.0
                for unit in self.chosen
            }
        ):
            yield

    def assign(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Give a module other weights; the original network keeps its own."""
        before = self.refitted.setdefault(module, {})
        for name, value in values.items():
            tensor = getattr(module, name)
            before.setdefault(name, tensor.data)
            tensor.data = value.to(tensor)

    def restore(self) -> None:
        """Give modules their original weights back."""
        _assign(self.refitted)

    def order(self, modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
        """How often each module is called on a batch, in the order of the first calls."""
        calls: dict[nn.Module, int] = {}

        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[module] = calls.get(module, 0) + 1

        handles = [module.register_forward_pre_hook(count) for module in modules]
        try:
            with self.original():
                self.run(self.batches[0])
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def see(self, module: nn.Module, batch: Any, calls: int) -> Seen:
        """Run a batch up to the last call of a module; what came in and went out of it."""
        seen: Seen = []
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            overwrites = getattr(module, "overwrites_input", False)
            inputs.append(args[0].clone() if overwrites else args[0])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.append((inputs[-1], output))
            if len(seen) == calls:
                raise _EnoughError

        handles = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]
        try:
            self.run(batch)
        except _EnoughError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def run(self, batch: Any) -> Any:
        """The model's output."""
        return call_model(self.model, batch)

    def log_probabilities(self, batch: Any) -> Tensor:
        """The model's output read as logits, one row per answer, as logarithms of probabilities."""
        return log_probabilities(logits_of(self.run(batch)))


class _EnoughError(Exception):
    """Ends a run whose rest is not needed."""


class _HeldGate(nn.Module):
    """Stands in for a gate: the same value for all."""

    straight_through = False

    def __init__(self, gate: Gate, value: float | Tensor) -> None:
        super().__init__()
        self.shape = gate.shape
        self.z = torch.zeros_like(gate.predict()) + value

    def predict(self) -> Tensor:
        return self.z


@contextmanager
def _held(values: Mapping[GatedActivation, float | Tensor]) -> Iterator[None]:
    gates = {unit: unit.gate for unit in values}
    try:
        for unit, value in values.items():
            unit._modules["gate"] = _HeldGate(unit.gate, value)
        yield
    finally:
        for unit, gate in gates.items():
            unit._modules["gate"] = gate


def _partly_transferred(unit: GatedActivation) -> Tensor | None:
    z = unit.gate.predict().detach()
    gone = z == 0
    return z if bool(gone.any()) and not bool(gone.all()) else None


@contextmanager
def _with_values(values: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Give parameters other data for a while."""
    now = {m: {name: getattr(m, name).data for name in named} for m, named in values.items()}
    try:
        _assign(values)
        yield
    finally:
        _assign(now)


def _assign(values: Mapping[nn.Module, Mapping[str, Tensor]]) -> None:
    for module, named in values.items():
        for name, value in named.items():
            getattr(module, name).data = value
