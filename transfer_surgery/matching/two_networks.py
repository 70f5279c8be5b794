"""Runs a converted model as the original network, or as the one that it is becoming.

A run ends at the module that is looked at. Nothing of the model is changed by a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from transfer_surgery._running import arguments_of, hooked, log_probabilities, logits_of
from transfer_surgery.units import Gate, GatedActivation

Seen = list[tuple[Tensor, Tensor]]
"""Input and output of each call of a module."""


class TwoNetworks:
    """Both networks that a converted model can compute.

    `run`, `log_probabilities` and `see` share two arguments:

    - ``transferred``: those of `units` that run at their target; the others run at their source.
      A unit some of whose gates are transferred already keeps its gates where they are.
    - ``weights``: ``"original"`` runs the layers with the weights that they had at first, and
      units that are not among `units` at their source: with nothing transferred, this is the
      original network. ``"now"`` leaves layers and the other units as they are.

    Args:
        model: the converted model.
        units: the sites that are compared, fitted or swapped.
        batches: what the model is called with: tensors, tuples of arguments or dicts of keyword
            arguments.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[GatedActivation], batches: Sequence[Any]
    ) -> None:
        self.model, self.batches = model, batches
        self.units = list(units)
        every = [module for module in model.modules() if isinstance(module, GatedActivation)]
        self._others = [unit for unit in every if unit not in self.units]
        self._mixed = {unit: z for unit in units if (z := _gates_if_mixed(unit)) is not None}
        self._original: dict[str, Tensor] = {}
        """Weights that have been replaced since, by their path in the model."""

    def run(
        self,
        batch: Any,
        transferred: Collection[GatedActivation] = (),
        weights: str = "original",
    ) -> Any:
        """The output for a batch; the arguments are explained at the class."""
        gates: dict[GatedActivation, float | Tensor] = {
            unit: self._mixed.get(unit, 0.0) if unit in transferred else 1.0 for unit in self.units
        }
        values: dict[str, Tensor] = {}
        if weights == "original":
            gates |= dict.fromkeys(self._others, 1.0)
            values = self._original
        with _gates_held_at(gates):
            return functional_call(self.model, values, *arguments_of(batch))

    def log_probabilities(self, batch: Any, *network: Any) -> Tensor:
        """The output of `run` read as logits: one row of logarithms of probabilities per answer."""
        return log_probabilities(logits_of(self.run(batch, *network)))

    def see(self, module: nn.Module, batch: Any, calls: int, *network: Any) -> Seen:
        """Run a batch up to the last call of a module, and return what it got and gave."""
        seen: Seen = []
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            overwrites = getattr(module, "overwrites_input", False)
            inputs.append(args[0].clone() if overwrites else args[0])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.append((inputs[-1], output))
            if len(seen) == calls:
                raise _EnoughError

        handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
        with hooked(*handles), suppress(_EnoughError):
            self.run(batch, *network)
        return seen

    def count_calls(self, modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
        """How often each module is called on a batch, in the order of the first calls."""
        calls: dict[nn.Module, int] = {}

        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[module] = calls.get(module, 0) + 1

        with hooked(*(module.register_forward_pre_hook(count) for module in modules)):
            self.run(self.batches[0])
        return calls

    def assign(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Give a module other weights; the original network keeps its own."""
        path = next(path for path, found in self.model.named_modules() if found is module)
        for name, value in values.items():
            tensor = getattr(module, name)
            self._original.setdefault(f"{path}.{name}", tensor.data)
            tensor.data = value.to(tensor)

    def restore(self) -> None:
        """Give the modules their original weights back."""
        for path, value in self._original.items():
            module, _, name = path.rpartition(".")
            getattr(self.model.get_submodule(module), name).data = value


class _EnoughError(Exception):
    """Ends a run whose rest is not needed."""


class _HeldGate(nn.Module):
    """Stands in for a gate of any kind, with the same value in every call."""

    straight_through = False

    def __init__(self, gate: Gate, value: float | Tensor) -> None:
        super().__init__()
        self.shape = gate.shape
        self.z = torch.zeros_like(gate.predict()) + value

    def forward(self, batch: int) -> Tensor:
        return self.z

    def predict(self) -> Tensor:
        return self.z


@contextmanager
def _gates_held_at(values: Mapping[GatedActivation, float | Tensor]) -> Iterator[None]:
    gates = {unit: unit.gate for unit in values}
    try:
        for unit, value in values.items():
            unit._modules["gate"] = _HeldGate(unit.gate, value)
        yield
    finally:
        for unit, gate in gates.items():
            unit._modules["gate"] = gate


def _gates_if_mixed(unit: GatedActivation) -> Tensor | None:
    """The values of a unit's gates if some are transferred and others are not."""
    z = unit.gate.predict().detach()
    transferred = z == 0
    return z if bool(transferred.any()) and not bool(transferred.all()) else None
