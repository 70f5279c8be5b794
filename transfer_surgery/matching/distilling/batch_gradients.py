"""The gradients of one batch: of all that `distill` compares."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transfer_surgery._running import call_model
from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.distilling.distill_loss import Loss
from transfer_surgery.matching.distilling.held_out import detached_copy, teach
from transfer_surgery.matching.distilling.layer_outputs import (
    Outputs,
    PairedLayers,
    layers_error,
    outputs_kept,
)
from transfer_surgery.matching.distilling.polynomial_range import FittedRanges

KL_WEIGHT = 4.0
"""Weight of the error of the layers beside a divergence, as in the study of ResNets."""

_RANGE_WEIGHT = 0.05  # of inputs outside of the range of polynomials, beside the layers' error


class BatchGradients:
    """Computes the loss of a batch, and its gradients.

    Args:
        model: the network that learns.
        teacher: the one that teaches.
        trained: parameters of the model that get gradients.
        compare: the loss of the outputs.
        layers: modules of both networks whose outputs are compared.
        ranges: of the model's polynomials.
        weight: of the error of the layers, beside the loss of the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        trained: Sequence[nn.Parameter],
        compare: Loss,
        layers: PairedLayers,
        ranges: FittedRanges,
        weight: float,
    ) -> None:
        self._model, self._teacher, self._trained = model, teacher, trained
        self._compare, self._layers, self._ranges, self._weight = compare, layers, ranges, weight
        self._graphs: AbstractContextManager[Any] = nullcontext()

    def compute(self, batch: Any, step: int) -> Tensor:
        """Give the parameters the gradients of the loss of a batch, and return the loss.

        Args:
            batch: without labels.
            step: its number, from 1 on.

        Raises:
            ValueError: the teacher does not run on the batch.
        """
        with outputs_kept(self._layers.teacher) as theirs:
            wanted = teach(self._teacher, batch, f"the batch of step {step}")
            try:
                return self._backward(batch, wanted, theirs)
            except RuntimeError as error:
                if step > 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                # Some networks keep the graph of their forces in training mode alone. So the first
                # step tries once more, with all graphs kept.
                self._graphs = _GraphsKept()
                return self._backward(batch, wanted, theirs)

    def _backward(self, batch: Any, wanted: Any, theirs: Outputs) -> Tensor:
        for parameter in self._trained:
            parameter.grad = None
        ranges, layers = self._ranges, self._layers.model
        with (
            ranges.bounded(),
            ranges.watched(),
            self._graphs,
            outputs_kept(layers, learn=True) as ours,
        ):
            now = call_model(self._model, map_tensors(detached_copy, batch))
            found = self._compare(now, wanted)
            inside = layers_error(ours, theirs) + _RANGE_WEIGHT * ranges.penalty()
            found = found + self._weight * inside.to(found)
            found.backward()  # type: ignore[no-untyped-call]
        return found.detach()


class _GraphsKept(TorchFunctionMode):
    """Gradients that a forward pass takes can be differentiated, as many can in training mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            given = dict(zip(inspect.signature(func).parameters, args, strict=False)) | kwargs
            return func(**given | {"create_graph": True, "retain_graph": True})
        return func(*args, **kwargs)
