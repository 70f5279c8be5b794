"""The transfer over time: what `report` says at one moment, recorded step after step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

from torch import Tensor, nn

from transfer_surgery._table import data_frame, finite
from transfer_surgery.reports.transfer_report import Report, ReportRow, report
from transfer_surgery.units import gated_activations, stage_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One recorded step.

    Args:
        step: the step's number.
        report: the gates at that step.
        values: further numbers that were recorded, such as ``{"lr": 0.1}``.
    """

    step: float
    report: Report
    values: Mapping[str, float]


class History:
    """Records the state of a converted model's gates over the steps of a training.

    A pickled or copied history does not include its model (`model` is None). It can be read and
    plotted anywhere, and it can record again once `model` is set.

    Args:
        model: a converted model.

    Raises:
        ValueError: the model was not converted.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 2))
        >>> history = History(model)
        >>> _ = history.record(lr=0.1)
        >>> model[0].log_alpha.data = torch.tensor([-9.0, 9.0])
        >>> _ = history.record(lr=0.05)
        >>> history.flat()
        {'transfer/total': 0.5, 'gate/total': 0.5, 'transfer/0': 0.5, 'gate/0': 0.5}

        One line of JSON per record, in a file or, as here, on the screen:

        >>> print(json.dumps({"step": history.records[-1].step, **history.flat()}))
        {"step": 1, "transfer/total": 0.5, "gate/total": 0.5, "transfer/0": 0.5, "gate/0": 0.5}
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model
        units = list(gated_activations(model))
        self.paths = tuple(path for path, _ in units)
        self.stages = tuple(stage_of(path, unit) for path, unit in units)
        self.records: list[Record] = []

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"History({len(self)} records of {len(self.paths)} sites)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}

    def record(self, step: float | None = None, **values: SupportsFloat) -> Report:
        """Record the model's gates as they are now; call it in the training loop.

        Args:
            step: number of the step, which must be greater than the last one. By default it is the
                last one plus 1, starting at 0.
            values: numbers to keep with the step, such as ``lr`` (which `plot` draws) or ``loss``.
                Different steps may have different ones.

        Returns:
            The report from which the record was made.

        Raises:
            ValueError: the step is not greater than the last one, a value is not one number or has
                a name of `flat`, or the model's sites have changed since the history began.
            RuntimeError: the history was loaded or copied without its model.
        """
        if self.model is None:
            raise RuntimeError(
                "this history was loaded without its model: set history.model first."
            )
        last = self.records[-1].step if self.records else -1
        if step is None:
            step = last + 1
        if not math.isfinite(step) or (self.records and step <= last):
            raise ValueError(f"step {step} was recorded after step {last}: steps must increase.")
        numbers = {name: _number(name, value) for name, value in values.items()}
        now = report(self.model)
        if tuple(row.path for row in now) != self.paths:
            raise ValueError(
                "the model's gated activations are not those that this history began with "
                f"({len(now)} sites, before {len(self.paths)}): create a new History(model)."
            )
        self.records.append(Record(step, now, numbers))
        return now

    def value_names(self) -> tuple[str, ...]:
        """Names of the values given to `record`, in order of appearance."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.values))

    def value(self, name: str) -> list[float | None]:
        """A recorded value at each step; None where it was not given."""
        return [record.values.get(name) for record in self.records]

    def flat(self) -> dict[str, float]:
        """The latest record as one flat dict, for loggers.

        TensorBoard's ``SummaryWriter`` takes one item at a time, wandb and JSON take the dict::

            history.record(step)
            for name, value in history.flat().items():
                writer.add_scalar(name, value, step)
            wandb.log(history.flat(), step)
            print(json.dumps({"step": step, **history.flat()}), file=lines)

        Returns:
            ``"transfer/total"`` and ``"gate/total"``, then ``"transfer/<path>"`` and
            ``"gate/<path>"`` for each site.

        Raises:
            ValueError: nothing was recorded yet.
        """
        if not self.records:
            raise ValueError("nothing was recorded yet: call history.record() first.")
        return self._flat(self.records[-1])

    def _flat(self, record: Record) -> dict[str, float]:
        total = record.report.total
        flat = {"transfer/total": total.transferred, "gate/total": total.mean_gate}
        for row in record.report:
            flat |= {f"transfer/{row.path}": row.transferred, f"gate/{row.path}": row.mean_gate}
        return flat

    def to_dict(self) -> dict[str, Any]:
        """Lists over steps, in plain numbers and strings, with the version of this layout."""
        reports = [record.report for record in self.records]

        def shares(rows: list[ReportRow]) -> dict[str, list[float]]:
            return {
                "transferred": [row.transferred for row in rows],
                "mean_gate": [row.mean_gate for row in rows],
            }

        return {
            "version": _VERSION,
            "steps": [record.step for record in self.records],
            "total": shares([report.total for report in reports]),
            "sites": [
                {"path": path, "stage": stage, **shares([report.rows[i] for report in reports])}
                for i, (path, stage) in enumerate(zip(self.paths, self.stages, strict=True))
            ],
            "values": {name: self.value(name) for name in self.value_names()},
        }

    def to_json(self) -> str:
        """The text of `to_dict`, in which numbers that are not finite are null."""
        return json.dumps(finite(self.to_dict()), allow_nan=False)

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with one line per step: the step, the values and the columns of `flat`.

        Raises:
            ImportError: pandas is not installed.
        """
        names = self.value_names()
        return data_frame(
            [
                {"step": r.step, **{name: r.values.get(name) for name in names}, **self._flat(r)}
                for r in self.records
            ]
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """`transfer_surgery.reports.plot_history` of this history."""
        from transfer_surgery.reports.history_plot import plot_history

        return plot_history(self, ax)


def _number(name: str, value: SupportsFloat) -> float:
    """A plain number, also where a loss still requires a gradient."""
    if name.startswith(("transfer/", "gate/")):
        raise ValueError(
            f"{name}: names with transfer/ and gate/ are those of gates; choose another."
        )
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={value!r} is not one number ({error}).") from error
