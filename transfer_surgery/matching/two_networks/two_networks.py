"""Runs a converted model as the original network, or as the one that it is becoming.

Nothing of the model is changed by a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from transfer_surgery._running import call_model, explained, with_gradients_if_needed
from transfer_surgery._tensors import map_tensors
from transfer_surgery.units import Gate, GatedActivation

T = TypeVar("T")


class TwoNetworks:
    """Both networks that a converted model can compute.

    In the original network every unit runs at its source. In the other one, those of `units` that
    are transferred run at their target. A unit some of whose gates are transferred already keeps
    these where they are.

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
        self.others = [unit for unit in every if unit not in self.units]
        self._mixed = {unit: z for unit in units if (z := _gates_if_mixed(unit)) is not None}
        self._needs_gradients = False
        self._may_overwrite = True
        self._has_run = False

    def transferred_gate(self, unit: GatedActivation) -> float | Tensor:
        """What the gates of one of `units` are in the other network when it is transferred."""
        return self._mixed.get(unit, 0.0)

    def run(
        self,
        batch: Any,
        transferred: Collection[GatedActivation] = (),
        others_at_source: bool = True,
    ) -> Any:
        """The output for a batch.

        Args:
            batch: one of the batches.
            transferred: those of `units` that run at their target; none: the original network.
            others_at_source: whether units that are not among `units` run at their source, too;
                else they run at their gates.
        """
        gates: dict[GatedActivation, float | Tensor] = {
            unit: self.transferred_gate(unit) if unit in transferred else 1.0 for unit in self.units
        }
        if others_at_source:
            gates |= dict.fromkeys(self.others, 1.0)
        with _gates_held_at(gates):
            return self.call(batch)

    def call(self, batch: Any) -> Any:
        """The output with the gates as they are, from a batch that stays as it is.

        Raises:
            ValueError: the model does not run on the batch.
        """
        number = next((i for i, known in enumerate(self.batches) if known is batch), None)
        with (
            nullcontext() if number is None else explained(self.model, f"batches[{number}]", batch)
        ):
            return self._call(batch)

    def _call(self, batch: Any) -> Any:
        if self._may_overwrite:  # some networks write into their input
            batch = map_tensors(Tensor.clone, batch)
        with torch.set_grad_enabled(self._needs_gradients or torch.is_grad_enabled()):
            output = call_model(self.model, batch)
        if self._may_overwrite:
            versions: list[int] = []
            map_tensors(lambda x: versions.append(x._version), batch)
            self._may_overwrite = any(versions)
        return output

    def with_gradients_if_needed(self, use: Callable[[], T]) -> T:
        """Call something that runs the networks; with gradients if the first run fails without."""
        if self._has_run:
            return use()

        def run(gradients: bool) -> T:
            self._needs_gradients = gradients
            return use()

        result, _ = with_gradients_if_needed(run)
        self._has_run = True
        return result


class HeldGate(nn.Module):
    """Stands in for a gate of any kind, with the same value in every call."""

    straight_through = learned = False

    def __init__(self, gate: Gate, value: float | Tensor) -> None:
        super().__init__()
        self.shape = gate.shape
        self.z = torch.zeros_like(gate.predict()) + value

    def forward(self, batch: int) -> Tensor:
        return self.predict()

    def predict(self) -> Tensor:
        return self.z


class GateOfTwo(HeldGate):
    """Stands in for a gate: 1 in the original network, its own value in the other one."""

    def __init__(self, gate: Gate, own: float | Tensor, is_original: Callable[[], bool]) -> None:
        super().__init__(gate, own)
        self._is_original = is_original
        self._source = torch.ones_like(self.z)

    def transfer(self, value: float | Tensor) -> None:
        """From now on the other network has this value."""
        self.z = torch.zeros_like(self.z) + value

    def predict(self) -> Tensor:
        return self._source if self._is_original() else self.z


@contextmanager
def _gates_held_at(values: Mapping[GatedActivation, float | Tensor]) -> Iterator[None]:
    gates = {unit: unit.gate for unit in values}
    try:
        for unit, value in values.items():
            unit._modules["gate"] = HeldGate(unit.gate, value)
        yield
    finally:
        for unit, gate in gates.items():
            unit._modules["gate"] = gate


def _gates_if_mixed(unit: GatedActivation) -> Tensor | None:
    """The values of a unit's gates if some are transferred and others are not."""
    z = unit.gate.predict().detach()
    transferred = z == 0
    return z if bool(transferred.any()) and not bool(transferred.all()) else None
