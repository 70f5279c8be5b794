"""A network beside its original on held-out inputs: outputs, answers, labels, zeros."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from transfer_surgery._running import explained, hooked, prediction_mode, to_device_of
from transfer_surgery.matching.answers import log_probabilities, logits_of
from transfer_surgery.matching.output_check import example_count
from transfer_surgery.matching.output_errors import OutputChange
from transfer_surgery.matching.swapping.swap_report import SwapStage
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks


class StageComparison:
    """The rows of a `SwapReport`: compares a network with its original after each stage.

    Args:
        original: the original network; its outputs for all batches are kept in memory.
        sites: paths of the modules whose zeros are counted.
        batches: inputs that nothing is fitted to; they are gone through once for each stage.
        labels: the classes of the examples of each batch; None: not known.
        logits: whether the outputs are logits of classes.

    Raises:
        ValueError: there are no batches, the original returns NaN, or the labels are not one class
            for each of its answers.
    """

    def __init__(
        self,
        original: nn.Module,
        sites: Collection[str],
        batches: Iterable[Any],
        labels: Iterable[Tensor] | None,
        logits: bool,
    ) -> None:
        self._sites, self._batches, self._logits = sites, batches, logits
        self._labels = None if labels is None else list(labels)
        self.wanted: list[Any] = []
        """What the original network returns for each batch."""
        self.examples = 0
        """Number of inputs that are compared; 0 where a batch does not show it."""
        self.rows: list[SwapStage] = []
        """One for each stage that was added."""
        self._seconds = 0.0

        def note(batch: Any, output: Any) -> None:
            self.wanted.append(output)
            self.examples += example_count(batch)

        self._run(original, note)
        if not self.wanted:
            raise ValueError("held_out: there are no batches; give some that nothing is fitted to.")
        if any(bool(leaf.isnan().any()) for leaf in tree_leaves(self.wanted) if _is_number(leaf)):
            raise ValueError(
                "held_out: the original network returns NaN for these inputs. Check its weights, "
                "and leave such inputs out."
            )
        if self._labels is not None:
            self._check_labels(self._labels)

    def _check_labels(self, labels: Sequence[Any]) -> None:
        if not all(isinstance(classes, Tensor) for classes in labels):
            raise ValueError("labels: give one tensor of class numbers for each batch of held_out.")
        answers = [log_probabilities(logits_of(output)) for output in self.wanted]
        found, wanted = [classes.numel() for classes in labels], [len(y) for y in answers]
        if found != wanted:
            raise ValueError(
                f"the batches of labels have {_some(found)} classes, and those of held_out "
                f"{_some(wanted)} answers: give one class for each answer."
            )
        number = answers[0].shape[1]
        if any(y.is_floating_point() or y.min() < 0 or y.max() >= number for y in labels):
            raise ValueError(f"labels: the classes are whole numbers from 0 to {number - 1}.")

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is done in here is the stage that is added next."""
        start = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - start

    def add(self, name: str, network: nn.Module, fitted: int = 0) -> None:
        """Add a row for a stage.

        Args:
            name: what was done.
            network: the network after it.
            fitted: number of sites with numbers of their own.
        """
        self.rows.append(SwapStage(name, *self._compared(network), fitted, self._seconds))

    def points_lost(self, network: nn.Module) -> float:
        """How many points of accuracy a network has less than that of the first row."""
        before, now = self.rows[0].accuracy, self._compared(network)[3]
        assert before is not None
        assert now is not None
        return round(100 * (before - now), 9)  # so that 1 of 100 answers is not above 1.0

    def _compared(
        self, network: nn.Module
    ) -> tuple[dict[str, float], float | None, float | None, float | None, float]:
        """Errors, divergence, changed answers, accuracy and zeros, as in a row."""
        change, zeros = OutputChange(self._logits), _Zeros()
        wanted, right = iter(self.wanted), 0
        labels = itertools.repeat(None) if self._labels is None else iter(self._labels)

        def compare(batch: Any, output: Any) -> None:
            nonlocal right
            change.add(output, next(wanted))
            if (classes := next(labels)) is not None:
                answers = log_probabilities(logits_of(output)).argmax(1)
                right += int((answers == classes.flatten().to(answers.device)).sum())

        modules = [network.get_submodule(path) for path in self._sites]
        with hooked(*(module.register_forward_hook(zeros) for module in modules)):
            self._run(network, compare)
        accuracy = None if self._labels is None else right / sum(y.numel() for y in self._labels)
        return *change.values(), accuracy, zeros.share()

    def _run(self, network: nn.Module, use: Callable[[Any, Any], None]) -> None:
        networks = TwoNetworks(network, [], [])
        with prediction_mode(network):
            for number, batch in enumerate(self._batches):
                batch = to_device_of(network, batch)
                with explained(network, f"held-out batch {number}", batch):
                    output = networks.with_gradients_if_needed(partial(networks.call, batch))
                use(batch, output)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _some(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:8])) + ", ..." * (len(counts) > 8)


class _Zeros:
    """A forward hook that counts exact zeros."""

    def __init__(self) -> None:
        self._zeros = self._elements = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._zeros += output.numel() - int(torch.count_nonzero(output))
        self._elements += output.numel()

    def share(self) -> float:
        return self._zeros / max(self._elements, 1)
