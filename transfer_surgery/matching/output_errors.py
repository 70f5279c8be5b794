"""How far the outputs of two networks are apart, whatever they return.

An output is a tree of tensors. The error of each tensor is its relative squared error: the sum of
the squared differences, divided by the sum of the squared deviations of the wanted values from
their mean over the examples. So 0 is perfect, and 1 is as good as the mean. It depends neither on
the unit nor on the zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._tensors import attributes_of
from transfer_surgery.matching.answers import log_probabilities, logits_of


def output_tensors(output: Any) -> dict[str, Tensor]:
    """The real and complex tensors of an output, by name: ``"output"``, ``"1"``, ``"boxes.0"``.

    Looked through are mappings, sequences, and objects that keep tensors as attributes. Complex
    tensors are read as pairs of real numbers, sparse ones as dense.

    Raises:
        TypeError: there are none.

    Examples:
        >>> found = output_tensors((torch.zeros(2), {"logits": torch.ones(2, 3)}, "text"))
        >>> {name: tuple(tensor.shape) for name, tensor in found.items()}
        {'0': (2,), '1.logits': (2, 3)}
    """
    found = {name or "output": tensor for name, tensor in _walk(output, "", frozenset())}
    if not found:
        raise TypeError(
            f"the model returns {type(output).__name__} without a floating tensor in it."
        )
    return found


def _walk(value: Any, name: str, above: frozenset[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        dense = value if value.layout == torch.strided else value.to_dense()
        if dense.is_complex():
            yield name, torch.view_as_real(dense)
        elif dense.is_floating_point():
            yield name, dense
        return
    parts: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        parts = iter(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = iter(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        parts = iter(enumerate(value))
    elif not isinstance(value, type | nn.Module) and not callable(value):
        parts = iter(attributes_of(value).items())
    if id(value) not in above:  # an object may refer to itself
        for key, part in parts:
            yield from _walk(part, f"{name}.{key}" if name else str(key), above | {id(value)})


def paired_tensors(now: Any, wanted: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of two outputs, side by side.

    Raises:
        TypeError: there are none, or their names or shapes differ.
    """
    ours, theirs = output_tensors(now), output_tensors(wanted)
    if ours.keys() != theirs.keys():
        raise TypeError(
            f"the outputs cannot be compared: one has {sorted(ours)}, the other {sorted(theirs)}."
        )
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise TypeError(
                f"the outputs {name!r} cannot be compared: their shapes are "
                f"{tuple(tensor.shape)} and {tuple(theirs[name].shape)}. Where their number "
                "depends on the inputs, as that of boxes that are found, let the model return what "
                "they are chosen from."
            )
    return {name: (tensor, theirs[name]) for name, tensor in ours.items()}


@dataclass
class OutputErrors:
    """Relative squared errors of each output, summed up over batches."""

    _sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, now: Any, wanted: Any) -> None:
        """One batch of two networks' outputs.

        Raises:
            TypeError: they cannot be compared.
        """
        for name, (ours, theirs) in paired_tensors(now, wanted).items():
            self._sums.setdefault(name, _Sums()).add(ours.detach(), theirs.detach())

    def relative(self) -> dict[str, float]:
        """The relative squared error of each output; infinite where a constant was missed."""
        return {name: sums.relative() for name, sums in self._sums.items()}

    def scales(self) -> dict[str, float]:
        """The mean squared deviation of each wanted output from its mean; never 0."""
        return {name: sums.scale() for name, sums in self._sums.items()}


class _Sums:
    """Sums of one output. The mean is taken over the first axis, as long as the others agree."""

    error = 0.0
    elements = 0
    squares = 0.0
    count = 0
    total: Tensor | None = None

    def add(self, now: Tensor, wanted: Tensor) -> None:
        now, wanted = now.double(), wanted.double()
        # Masked logits are -inf in both networks: there is nothing to compare.
        used = (wanted != -torch.inf) | (now != wanted)
        now, wanted = (torch.where(used, x, 0.0) for x in (now, wanted))
        rows = wanted[None] if wanted.dim() == 0 else wanted
        total = rows.sum(0).cpu()
        if self.total is None:
            self.total = torch.zeros_like(total)
        elif self.total.shape != total.shape:
            self.count *= self.total.numel()
            self.total = self.total.sum()
            rows, total = rows.flatten(), total.sum()
        self.error += float((now - wanted).square().sum())
        self.squares += float(wanted.square().sum())
        self.elements += wanted.numel()
        self.total = self.total + total
        self.count += rows.shape[0]

    def _variation(self) -> float:
        """The sum of the squared deviations from the mean."""
        if self.total is None or not self.elements:
            return 0.0
        total, count = self.total, self.count
        if count == 1:  # one example: deviations from the mean of its elements
            total, count = total.sum(), total.numel()
        found = self.squares - float(total.square().sum()) / count
        return found if found > 1e-12 * self.squares else 0.0  # what is less is rounding

    def relative(self) -> float:
        scale = self._variation() or self.squares
        if not scale:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / scale

    def scale(self) -> float:
        return (self._variation() or self.squares) / max(self.elements, 1) or 1.0


def error_cell(errors: Mapping[str, float] | None) -> str:
    """The errors of a row as a table shows them: without a name where there is one output."""
    if errors is None:
        return "-"
    if len(errors) == 1:
        return f"{next(iter(errors.values())):.4f}"
    return ", ".join(f"{name}: {error:.4f}" for name, error in errors.items())


def logits_if_declared(output: Any, declared: bool) -> Tensor | None:
    """The logits of an output, if the user declared them, or if they are named so."""
    if declared or (isinstance(output, Mapping) and "logits" in output):
        return logits_of(output)
    return None


class OutputChange:
    """Errors of the outputs, and how far answers are apart, summed up over batches.

    Args:
        logits: whether the outputs are logits of classes.
    """

    def __init__(self, logits: bool) -> None:
        self._declared, self._errors = logits, OutputErrors()
        self._divergence, self._changed, self._answers = 0.0, 0, 0

    def add(self, now: Any, wanted: Any) -> None:
        """One batch of two networks' outputs.

        Raises:
            TypeError: they cannot be compared.
        """
        self._errors.add(now, wanted)
        logits = logits_if_declared(now, self._declared)
        original = logits_if_declared(wanted, self._declared)
        if logits is not None and original is not None:
            ours, theirs = log_probabilities(logits), log_probabilities(original)
            self._divergence += float(kl_divergence(ours, theirs)) * len(theirs)
            self._changed += int((ours.argmax(1) != theirs.argmax(1)).sum())
            self._answers += len(theirs)

    def values(self) -> tuple[dict[str, float], float | None, float | None]:
        """Errors; the divergence and the share of changed answers, where there are logits."""
        errors = self._errors.relative()
        if not self._answers:
            return errors, None, None
        return errors, self._divergence / self._answers, self._changed / self._answers


def kl_divergence(now: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL divergence of answers from the wanted ones, both as `log_probabilities`."""
    # A class that is not wanted at all, as a masked one, adds nothing; computed it would be NaN.
    never = wanted == -torch.inf
    now, wanted = now.masked_fill(never, 0.0), wanted.masked_fill(never, 0.0)
    # Rounding can put it below zero, which no divergence is.
    return F.kl_div(now, wanted, log_target=True, reduction="batchmean").clamp_min(0)
