"""What `distill` did to the outputs, and a warning where it did no good."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from transfer_surgery._messages import user_stacklevel

SMALL = 0.01
"""A relative squared error, or a divergence, that is as good as none."""

_MORE = 1.1  # times the error at the start, from which on an output got worse


class DistillWarning(UserWarning):
    """Training did not bring the network, or one of its outputs, nearer to its teacher."""


class DistillReport(list[float]):
    """The loss of each step, and how far the outputs were from the teacher's.

    Args:
        losses: one per step.
        before: relative squared error of each output on the held-out batches before training: 0 is
            perfect, 1 is as good as the mean.
        after: the same for the state that was kept.
        kept: the step after which that state was reached; 0: the start.
        variation: how much inputs were varied.
    """

    def __init__(
        self,
        losses: Iterable[float],
        before: Mapping[str, float],
        after: Mapping[str, float],
        kept: int,
        variation: float,
    ) -> None:
        super().__init__(losses)
        self.before, self.after, self.kept, self.variation = before, after, kept, variation

    def __str__(self) -> str:
        errors = (
            f"{name} {error:.2g} -> {self.after[name]:.2g}"
            for name, error in self.before.items()
            if name in self.after
        )
        return (
            f"{len(self)} steps, of which {self.kept} were kept; relative squared errors of the "
            f"outputs: {', '.join(errors)}"
        )

    @property
    def worse(self) -> tuple[str, ...]:
        """Names of the outputs whose error grew by more than a tenth, to more than 0.01."""
        return tuple(
            name
            for name, error in self.before.items()
            if self.after.get(name, 0.0) > max(_MORE * error, SMALL)
        )


def warn_of_no_gain(report: DistillReport) -> None:
    """Warn if the start was the best state, or if some output got worse."""
    if report.kept == 0:
        warnings.warn(
            f"distill did not bring the outputs nearer to the teacher's in {len(report)} steps, so "
            "the model is as it was. Take more steps, a lower lr, more inputs, or variation=0.",
            DistillWarning,
            stacklevel=user_stacklevel(),
        )
    elif report.worse:
        errors = ", ".join(
            f"{name} ({report.before[name]:.2g} -> {report.after[name]:.2g})"
            for name in report.worse
        )
        warnings.warn(
            f"distill made some outputs worse on the held-out batches: {errors}, relative squared "
            "errors. A function as loss= can give these more weight.",
            DistillWarning,
            stacklevel=user_stacklevel(),
        )


def warn_of_overflow(far: str) -> None:
    """Warn that the network at the start is no good, but that it can be trained."""
    warnings.warn(
        "the outputs for the held-out batches overflow at the start, since inputs leave the range "
        f"of the polynomials' fit. Their distances from its middle, in halves of it: {far}. "
        "Training starts nonetheless, with bounded polynomials. The best state without bounds is "
        "kept; if all of them overflow, there will be an error.",
        DistillWarning,
        stacklevel=user_stacklevel(),
    )


def overflow_remains(steps: int, far: str) -> str:
    """What to say where no state had finite outputs."""
    return (
        f"the outputs for the held-out batches overflow after {steps} steps as at the start, so "
        "the model is as it was. Inputs left the range of the polynomials' fit. Their distances "
        f"from its middle at the start, in halves of it: {far}. Take more steps, keep some sources "
        "with swap_targets(keep=0.2), or convert to polynomials of a higher degree."
    )
