"""What the user asks for before the framework knows optimizer, model and number of steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from transfer_surgery.reports import History
from transfer_surgery.transfer import TransferSchedule, wrap_optimizer

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def _keyword_only(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


# Read from the signatures, so that a new option is at once one of every framework.
_SCHEDULE = _keyword_only(TransferSchedule)
_OPTIMIZER = _keyword_only(wrap_optimizer) - {"transfer"}


@dataclass(frozen=True)
class TransferSettings:
    """Arguments of `TransferSchedule` and `wrap_optimizer`, kept until the training begins.

    Args:
        transfer: a schedule, or None to make one of the keyword arguments.
        schedule: keyword arguments of `TransferSchedule`.
        optimizer: keyword arguments of `wrap_optimizer`.
    """

    transfer: TransferSchedule | None
    schedule: Mapping[str, Any]
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, transfer: TransferSchedule | None, settings: Mapping[str, Any]) -> TransferSettings:
        """Sort keyword arguments into those of the schedule and those of the optimizer.

        Raises:
            TypeError: neither has an argument of such a name, or `transfer` is no schedule.
            ValueError: the arguments exclude each other.

        Examples:
            >>> TransferSettings.of(None, {"fraction": 0.5, "gate_lr": 0.1}).schedule
            {'fraction': 0.5}
        """
        unknown = sorted(settings.keys() - _SCHEDULE - _OPTIMIZER)
        if unknown:
            raise TypeError(
                f"unknown settings {', '.join(unknown)}: use those of TransferSchedule "
                f"({', '.join(sorted(_SCHEDULE))}) or of wrap_optimizer "
                f"({', '.join(sorted(_OPTIMIZER))})."
            )
        if transfer is not None and not isinstance(transfer, TransferSchedule):
            raise TypeError(f"transfer={transfer!r}: give a TransferSchedule(total_steps).")
        schedule = {key: value for key, value in settings.items() if key in _SCHEDULE}
        optimizer = {key: value for key, value in settings.items() if key in _OPTIMIZER}
        if transfer is not None and schedule:
            raise ValueError(
                f"{', '.join(sorted(schedule))}: the TransferSchedule given says that already."
            )
        result = cls(transfer, schedule, optimizer)
        if schedule and not result.counts_steps:
            raise ValueError(
                f"{', '.join(sorted(schedule))}: of a transfer schedule, which gamma="
                f"{optimizer['gamma']} does without. Give one or the other."
            )
        return result

    @property
    def counts_steps(self) -> bool:
        """Whether the schedule is still to be made, from the framework's number of steps."""
        return self.transfer is None and self.optimizer.get("gamma") in (None, "auto")

    def wrap(
        self, optimizer: AnyOptimizer, model: nn.Module, total_steps: int | None
    ) -> AnyOptimizer:
        """`wrap_optimizer` with these settings.

        Args:
            optimizer: the optimizer that the framework steps.
            model: the converted model, or a module that holds it.
            total_steps: optimizer steps of the whole training; needed if `counts_steps`.
        """
        transfer = self.transfer
        if self.counts_steps:
            assert total_steps is not None
            transfer = TransferSchedule(total_steps, **self.schedule)
        return wrap_optimizer(optimizer, model, transfer=transfer, **self.optimizer)


def record_totals(history: History, step: int) -> dict[str, float]:
    """Record the gates, unless they were at this step, and return the two numbers for loggers."""
    if not history.records or history.records[-1].step < step:
        history.record(step)
    flat = history.flat()
    return {name: flat[name] for name in ("transfer/total", "gate/total")}
