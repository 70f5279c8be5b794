"""What became of the gates: one row per site or stage, from the prediction gates of Eq. 16.

A gate whose prediction is exactly 0 is *transferred* (pure target), one at exactly 1 is *kept*
(pure source), and any other is *mixed*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._table import Column, Table
from transfer_surgery.units import GatedActivation, gated_activations, stage_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUPINGS = ("site", "stage")
_Member = TypeVar("_Member")


@dataclass(frozen=True)
class ReportRow:
    """The gates of one site, or of several together.

    Args:
        path: where the site's unit lives in the model, or the name of a stage, or ``"total"``.
        source: the activation that the network had; ``"various"`` if several sites differ in it.
        target: the activation that it is transferred to, or ``"various"``.
        granularity: ``"layer"``, ``"channel"``, ``"neuron"`` or ``"various"``.
        gates: number of gates.
        neurons: elements of the feature shape that the gates share, per example.
        source_neurons: how many of these neurons still use the source, in kept or mixed gates.
        transferred: share of the gates that predict exactly 0.
        kept: share of the gates that predict exactly 1.
        mixed: share of the other gates.
        mean_gate: mean prediction, the E[z] of Figure 3.
        mean_log_alpha: mean ``log_alpha``; None for gates that have none (line, copy).
    """

    path: str
    source: str
    target: str
    granularity: str
    gates: int
    neurons: int
    source_neurons: int
    transferred: float
    kept: float
    mixed: float
    mean_gate: float
    mean_log_alpha: float | None


def _percent(share: float) -> str:
    """One decimal; only exact shares are written as 0 % or 100 %."""
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    bound = "<" if share < 0.001 else ">" if share > 0.999 else ""
    return f"{bound}{100 * min(max(share, 0.001), 0.999):.1f} %"


@dataclass(frozen=True, repr=False)
class Report(Table[ReportRow]):
    """What became of the gates: a table whose rows are in the order of the model's modules.

    Args:
        rows: one per site or stage.
        total: all gates together; not one of the rows.
        by: ``"site"`` or ``"stage"``.
    """

    columns = (
        Column("path"),
        Column("source"),
        Column("target"),
        Column("granularity"),
        Column("gates"),
        Column("neurons"),
        Column("source_neurons", "at source"),
        Column("transferred", text=_percent),
        Column("kept", text=_percent),
        Column("mixed", text=_percent),
        Column("mean_gate", "E[z]", ".3f"),
        Column("mean_log_alpha", "log_alpha", ".2f"),
    )
    total: ReportRow
    by: str = "site"

    def total_row(self) -> ReportRow:
        return self.total

    def __repr__(self) -> str:
        transferred = _percent(self.total.transferred)
        return (
            f"Report({len(self)} {self.by}s, {self.total.gates} gates, {transferred} transferred)"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """`transfer_surgery.reports.plot_report` of this report."""
        from transfer_surgery.reports.plots import plot_report

        return plot_report(self, ax)


def report(model: nn.Module | Mapping[str, GatedActivation], *, by: str = "site") -> Report:
    """Count transferred, kept and mixed gates of a converted model, site by site.

    The numbers of all sites travel to the host together, so a report waits for a GPU only once. If
    FSDP2 shards the gates, they are gathered first: call it on every rank, not only on the first.

    Args:
        model: a converted model, in train or eval mode; or its units, by path.
        by: ``"site"``, or ``"stage"`` for sums over the stages that the model's adapter names
            (``stem``, ``layer1``, ...). A site without a stage belongs to that of its top module.

    Returns:
        A `Report` with one row per site or stage.

    Raises:
        ValueError: the model was not converted, or ``by`` is neither.

    Examples:
        >>> from transfer_surgery import convert
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        >>> model = convert(network, example_input=torch.zeros(1, 3, 4, 4))
        >>> model[1].log_alpha.data = torch.tensor([-9.0, 0.0, 9.0, 9.0])
        >>> print(report(model))
        path   source  target  granularity  gates  neurons  at source  transferred    kept   mixed   E[z]  log_alpha
        ------------------------------------------------------------------------------------------------------------
        1      relu    sin     channel          4       64         48       25.0 %  50.0 %  25.0 %  0.625       2.25
        ------------------------------------------------------------------------------------------------------------
        total  relu    sin     channel          4       64         48       25.0 %  50.0 %  25.0 %  0.625       2.25
    """  # noqa: E501
    check_arguments(report, locals())
    if by not in _GROUPINGS:
        raise ValueError(f"by={by!r}: expected one of {', '.join(map(repr, _GROUPINGS))}.")
    found = gated_activations(model) if isinstance(model, nn.Module) else model.items()
    units = list(found)
    if not units:
        raise ValueError("the mapping has no units: give the units of a converted model.")
    with torch.no_grad():
        statistics = [_statistics(unit) for _, unit in units]
        # A model may be spread over several devices: gather on one of them first.
        numbers = torch.stack([s.to(statistics[0].device) for s in statistics]).tolist()
    rows = tuple(_row(path, unit, *n) for (path, unit), n in zip(units, numbers, strict=True))
    total = _sum("total", rows)
    if by == "stage":
        stages = by_stage((stage_of(path, unit) for path, unit in units), rows)
        rows = tuple(_sum(stage, members) for stage, members in stages.items())
    return Report(rows, total, by)


def _statistics(unit: GatedActivation) -> Tensor:
    """Transferred and kept gates, mean gate and mean ``log_alpha``, on the unit's device."""
    z = unit.gate.predict()
    log_alpha = (
        unit.gate.full_log_alpha().mean() if unit.gate.learned else torch.zeros_like(z.mean())
    )
    return torch.stack([(z == 0).sum().float(), (z == 1).sum().float(), z.mean(), log_alpha])


def _row(
    path: str, unit: GatedActivation, zeros: float, ones: float, gate: float, log_alpha: float
) -> ReportRow:
    gates = unit.gate.count
    return ReportRow(
        path=path,
        source=str(unit.source),
        target=str(unit.target),
        granularity=unit.granularity.name,
        gates=gates,
        neurons=unit.neurons,
        source_neurons=round(unit.neurons * (1 - zeros / gates)),
        transferred=zeros / gates,
        kept=ones / gates,
        mixed=(gates - zeros - ones) / gates,
        mean_gate=gate,
        mean_log_alpha=log_alpha if unit.gate.learned else None,
    )


def by_stage(stages: Iterable[str], of: Iterable[_Member]) -> dict[str, list[_Member]]:
    """What belongs to each stage, in the order in which the stages appear.

    Args:
        stages: the stage of each member.
        of: the members.
    """
    members: dict[str, list[_Member]] = {}
    for stage, member in zip(stages, of, strict=True):
        members.setdefault(stage, []).append(member)
    return members


def _sum(path: str, rows: Sequence[ReportRow]) -> ReportRow:
    """Several rows as one; shares and means are those of all their gates."""
    gates = sum(row.gates for row in rows)
    located = [(r.mean_log_alpha, r.gates) for r in rows if r.mean_log_alpha is not None]
    return ReportRow(
        path=path,
        source=_common(row.source for row in rows),
        target=_common(row.target for row in rows),
        granularity=_common(row.granularity for row in rows),
        gates=gates,
        neurons=sum(row.neurons for row in rows),
        source_neurons=sum(row.source_neurons for row in rows),
        # Whole counts make the total exact, too: 49 * (1 / 49) is not 1.
        transferred=sum(round(row.transferred * row.gates) for row in rows) / gates,
        kept=sum(round(row.kept * row.gates) for row in rows) / gates,
        mixed=sum(round(row.mixed * row.gates) for row in rows) / gates,
        mean_gate=_mean([(row.mean_gate, row.gates) for row in rows]),
        mean_log_alpha=_mean(located) if located else None,
    )


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return sum(v * n for v, n in weighted) / sum(n for _, n in weighted)


def _common(names: Iterator[str]) -> str:
    distinct = set(names)
    return distinct.pop() if len(distinct) == 1 else "various"
