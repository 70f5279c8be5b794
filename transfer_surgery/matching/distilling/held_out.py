"""Inputs to train on and others to look at, and the best state of a network on the latter."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfer_surgery._running import (
    call_model,
    explained,
    modes_kept,
    prediction_mode,
    to_device_of,
)
from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.distilling.distill_loss import Loss
from transfer_surgery.matching.output_errors import OutputErrors

_SHARE = 8  # of so many batches of a list one is held out
_MOST = 8  # batches that are held out at most: their outputs are kept in memory


def hold_out(batches: Iterable[Any]) -> tuple[Iterable[Any], list[Any]]:
    """Batches to train on, and others to look at.

    Of a list the last eighth is held out. Of fewer than eight batches, and of a loader, none can
    be: then the first ones are looked at too.

    Raises:
        ValueError: there are no batches.
    """
    if isinstance(batches, Tensor):
        batches = [batches]
    if isinstance(batches, Sequence) and (number := min(len(batches) // _SHARE, _MOST)):
        return batches[:-number], list(batches[-number:])
    first = list(itertools.islice(batches, _MOST))
    if not first:
        raise ValueError("batches: there are none; give some batches of the model's input.")
    if isinstance(batches, Iterator):  # what was taken from it is gone
        return itertools.chain(first, batches), first
    return batches, first


def looked_at_first(network: nn.Module, batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, once the network has run on the first: much is computed before they are used.

    Raises:
        ValueError: there are none, or the network does not run on it.
    """
    if isinstance(batches, Tensor):
        return looked_at_first(network, [batches])
    for first in batches:
        with prediction_mode(network):
            teach(network, to_device_of(network, first), "the first batch of distill_on")
        # What was taken from an iterator is gone.
        return itertools.chain([first], batches) if isinstance(batches, Iterator) else batches
    raise ValueError("distill_on: there are no batches; give some of the model's input.")


def repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """One batch per step; the batches start again when they end.

    Raises:
        ValueError: there are no batches, or an iterator is used up.
    """
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise ValueError(
                f"batches: there are none after {done} of {steps} steps; give a list or a loader, "
                "which can be repeated."
            )


class Asked(NamedTuple):
    """A batch and the output of the network that teaches."""

    batch: Any
    output: Any


def teach(network: nn.Module, batch: Any, name: str) -> Any:
    """The output of the network that teaches, without its graph.

    Gradients are on, since some networks take some inside of their forward. The inputs are copies,
    since some networks write into them.

    Args:
        network: it.
        batch: what it is called with.
        name: of the batch, for an error.

    Raises:
        ValueError: the network does not run on the batch.
    """
    with torch.enable_grad(), explained(network, name, batch):
        output = call_model(network, map_tensors(detached_copy, batch))
    return map_tensors(Tensor.detach, output)


def detached_copy(tensor: Tensor) -> Tensor:
    """A copy that does not know where it comes from."""
    return tensor.detach().clone()


class Examination:
    """Compares a network in evaluation mode with its teacher, and keeps the best state.

    Args:
        model: the network that learns, as it is at the start.
        trained: those of its parameters that may change; its buffers may, too.
        loss: what is compared.
        given: inputs with the teacher's outputs.
        further: the same of varied inputs. They count in the choice of the best state, as long as
            it does not answer the given inputs worse than the start.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[Tensor],
        loss: Loss,
        given: Sequence[Asked],
        further: Sequence[Asked] = (),
    ) -> None:
        self._model, self._trained, self._loss = model, trained, loss
        self._given, self._further = given, further
        self._best: dict[str | int, Tensor] = {}
        self._lowest, self._start = (math.inf, math.inf), math.inf
        self.step = 0
        """The step after which the best state was reached; 0: the start."""
        self.errors: dict[str, float] = {}
        """The relative squared error of each output in the best state."""

    def look(self, step: int) -> float:
        """The loss of the given inputs. The state is kept if it is the best until now.

        A loss that is not finite counts as infinite: any finite one is better.
        """
        given, every, errors = self._compare()
        if not self._best:
            self._start = given
        # Where varied inputs overflow in every state, the given ones decide.
        rank = (every, given)
        if not self._best or (given <= self._start and rank < self._lowest):
            self._lowest, self.step, self.errors = rank, step, errors.relative()
            self._best = copy.deepcopy(self._state())
        return given

    def loss(self) -> float:
        """The loss of the given inputs now, which may be infinite; nothing is kept."""
        return self._compare()[0]

    def _compare(self) -> tuple[float, float, OutputErrors]:
        """The loss of the given inputs, that of all, and the errors; infinite in place of NaN."""
        errors, losses = OutputErrors(), []
        with modes_kept(self._model):
            self._model.eval()
            for asked in (*self._given, *self._further):
                with torch.enable_grad():
                    now = call_model(self._model, map_tensors(detached_copy, asked.batch))
                loss = self._loss(now, asked.output).detach().item()
                losses.append(loss if math.isfinite(loss) else math.inf)
                if len(losses) <= len(self._given):
                    with suppress(TypeError):  # the user's loss may compare what we cannot
                        errors.add(now, asked.output)
        return fmean(losses[: len(self._given)]), fmean(losses), errors

    @contextmanager
    def best_at_the_end(self) -> Iterator[None]:
        """Afterwards the model is in its best state, also where there was an error."""
        try:
            yield
        finally:
            self.go_back()

    def go_back(self) -> None:
        """Bring back the best state."""
        with torch.no_grad():
            for name, tensor in self._state().items():
                best = self._best.get(name)
                if best is None:  # a table that a forward has made since
                    continue
                if tensor.shape != best.shape:  # one that has grown with its inputs
                    path, _, last = str(name).rpartition(".")
                    self._model.get_submodule(path)._buffers[last] = best.clone()
                # An expanded buffer takes no copy; a sparse one cannot be compared.
                elif tensor.layout != torch.strided or not _same(tensor, best):
                    tensor.copy_(best)

    def _state(self) -> dict[str | int, Tensor]:
        buffers = {name: buffer.detach() for name, buffer in self._model.named_buffers()}
        return {i: parameter.detach() for i, parameter in enumerate(self._trained)} | buffers


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values, where NaN is one."""
    return torch.equal(a, b) or (
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    )
