"""What a network learns from one batch: the gradients of all that distill compares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._running import call_model
from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.distilling.distill_loss import Loss
from transfer_surgery.matching.distilling.held_out import detached_copy, teach
from transfer_surgery.matching.distilling.layer_outputs import (
    Layers,
    Outputs,
    layers_error,
    outputs_kept,
)
from transfer_surgery.matching.distilling.polynomial_range import FittedRanges
from transfer_surgery.matching.distilling.trained import GraphsKept


class Lesson:
    """Computes the loss of a batch, and its gradients.

    Args:
        model: the network that learns.
        teacher: the one that teaches.
        trained: parameters of the model that get gradients.
        compare: the loss of the outputs.
        layers: modules of both networks whose outputs are compared.
        ranges: of the model's polynomials.
        weight: of the error of the layers, beside the loss of the outputs.
        range_weight: of the penalty on inputs out of range, beside the error of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        trained: Sequence[nn.Parameter],
        compare: Loss,
        layers: tuple[Layers, Layers],
        ranges: FittedRanges,
        weight: float,
        range_weight: float,
    ) -> None:
        self._model, self._teacher, self._trained = model, teacher, trained
        self._compare, self._layers = compare, layers
        self._ranges, self._weight, self._range_weight = ranges, weight, range_weight
        self._graphs: AbstractContextManager[Any] = nullcontext()

    def give(self, batch: Any, step: int) -> Tensor:
        """Give the parameters the gradients of the loss of a batch, and return the loss.

        Args:
            batch: without labels.
            step: its number, from 1 on.

        Raises:
            ValueError: the teacher does not run on the batch.
        """
        with outputs_kept(self._layers[1]) as theirs:
            wanted = teach(self._teacher, batch, f"the batch of step {step}")
            try:
                return self._backward(batch, wanted, theirs)
            except RuntimeError as error:
                if step > 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                # Forces, say, whose graph the network keeps in training mode alone.
                self._graphs = GraphsKept()
                return self._backward(batch, wanted, theirs)

    def _backward(self, batch: Any, wanted: Any, theirs: Outputs) -> Tensor:
        for parameter in self._trained:
            parameter.grad = None
        ranges, layers = self._ranges, self._layers[0]
        with ranges.bounded(), ranges.watched(), self._graphs, outputs_kept(layers) as ours:
            now = call_model(self._model, map_tensors(detached_copy, batch))
            found = self._compare(now, wanted)
            inside = layers_error(ours, theirs) + self._range_weight * ranges.penalty()
            found = found + self._weight * inside.to(found)
            found.backward()  # type: ignore[no-untyped-call]
        return found.detach()
