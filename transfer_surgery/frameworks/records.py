"""What the frameworks share: the schedule that the user asks for, and numbers for loggers."""

from __future__ import annotations

from collections.abc import Callable

from transfer_surgery.reports import History
from transfer_surgery.transfer import TransferSchedule

Schedule = TransferSchedule | Callable[[int], TransferSchedule]
"""A schedule, or a function that makes one from the framework's number of optimizer steps."""


def make_schedule(schedule: Schedule, count_steps: Callable[[], int]) -> TransferSchedule:
    """The schedule; one that is given already needs no count of the steps.

    Raises:
        TypeError: `schedule` is neither a schedule nor a function.

    Examples:
        >>> make_schedule(lambda steps: TransferSchedule(steps, fraction=0.5), lambda: 10).fraction
        0.5
    """
    if isinstance(schedule, TransferSchedule):
        return schedule
    if not callable(schedule):
        raise TypeError(
            f"schedule={schedule!r}: give a TransferSchedule, or a function of the number of "
            "steps such as lambda steps: TransferSchedule(steps, fraction=0.5)."
        )
    return schedule(count_steps())


def record_totals(history: History, step: int) -> dict[str, float]:
    """Record the gates, unless they were at this step, and return the two numbers for loggers."""
    if not history.records or history.records[-1].step < step:
        history.record(step)
    flat = history.flat()
    return {name: flat[name] for name in ("transfer/total", "gate/total")}
