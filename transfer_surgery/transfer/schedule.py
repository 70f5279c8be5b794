"""Transfer schedules: what share of the gates is transferred at which step, and who goes first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral

from transfer_surgery._messages import check_arguments
from transfer_surgery.units import GatedActivation, matches_glob

Sites = Mapping[str, GatedActivation]

SHAPES = ("cosine", "linear")
ORDERS = ("joint", "front_to_back", "back_to_front")


@dataclass(frozen=True)
class TransferSchedule:
    """What share of the gates is to be transferred, by when and in which order.

    Args:
        total_steps: optimizer steps of the whole training, ``epochs * steps_per_epoch``.
        fraction: share of the gates that is transferred at the end, in (0, 1]. Below 1 the others
            are kept at their source: those with the highest ``log_alpha`` when their turn comes
            (``order="joint"``), or those of the sites that come last in the order.
        start: when the transfer starts: a share of `total_steps` (a float) or optimizer steps (an
            int). No gate is moved before.
        end: when the transfer ends, in the same units. The remaining steps train the transferred
            network.
        shape: ``"cosine"`` (slow at both ends) or ``"linear"``.
        order: ``"joint"``: all gates go together, and what they learn decides who goes first.
            ``"front_to_back"`` or ``"back_to_front"``: one part of the network goes after the
            other. The parts are the stages of a zoo model (``stem``, ``layer1``, ...), or the sites
            where no stages are known. A sequence of globs on site paths: the sites of the first
            glob go first, then those of the second, and so on.

    ``TransferSchedule(n, start=0, end=1.0, shape="linear")`` gives the paper's *Line* and *Copy*
    when the model was converted with ``gate="line"`` or ``gate="copy"``.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        section 4.1 for *Line* and *Copy*; for the budget see docs/design.md, "Training".

    Examples:
        >>> schedule = TransferSchedule(100, start=0.1, end=0.5)
        >>> [round(schedule.budget(step), 3) for step in (0, 10, 20, 30, 40, 50, 100)]
        [1.0, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
        >>> TransferSchedule(100, start=10, end=50).budget(20) == schedule.budget(20)
        True
    """

    total_steps: int
    _: KW_ONLY
    fraction: float = 1.0
    start: float = 0.1
    end: float = 0.7
    shape: str = "cosine"
    order: str | Sequence[str] = "joint"

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps}: at least 1 step is needed.")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction={self.fraction}: the share of gates to transfer lies in (0, 1]."
            )
        if isinstance(self.end, Integral) and self.end == 1:
            raise ValueError("end=1 would be the first step; write end=1.0 for the last one.")
        if not 0 <= self._share(self.start) < self._share(self.end) <= 1:
            raise ValueError(
                f"start={self.start}, end={self.end}: shares of total_steps (floats, 1.0 is all of "
                "them) or optimizer steps (ints), with 0 <= start < end <= total_steps."
            )
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: use one of {', '.join(SHAPES)}.")
        if isinstance(self.order, str) and self.order not in ORDERS:
            raise ValueError(
                f"order={self.order!r}: use one of {', '.join(ORDERS)}, or a list of globs on "
                "site paths."
            )
        if not isinstance(self.order, str):
            object.__setattr__(self, "order", tuple(self.order))

    def _share(self, moment: float) -> float:
        return moment / self.total_steps if isinstance(moment, Integral) else moment

    def progress(self, step: int) -> float:
        """How far the gates that go have gone after `step` optimizer steps, from 0 to 1."""
        start, end = self._share(self.start), self._share(self.end)
        p = min(max((step / self.total_steps - start) / (end - start), 0.0), 1.0)
        return (1 - math.cos(math.pi * p)) / 2 if self.shape == "cosine" else p

    def budget(self, step: int) -> float:
        """Mean of ``P(z != 0)`` over all gates after `step` optimizer steps.

        The gates that go are a whole number, rounded up: of 3 gates and ``fraction=0.5``, 2.
        """
        return 1 - self.fraction * self.progress(step)


def split_in_order(
    sizes: Sequence[int], fraction: float, progress: float
) -> list[tuple[float, float]]:
    """Fraction and progress of each of several groups that go one after the other.

    The mean over all gates is that of a joint transfer: a group of many gates takes longer.

    Args:
        sizes: the number of gates of each group, in the order in which they go.
        fraction: the share of all gates that goes.
        progress: how far these gates have gone, from 0 to 1.

    Examples:
        >>> split_in_order([10, 10, 20], 0.75, 0.5)
        [(1.0, 1.0), (1.0, 0.5), (0.5, 0.0)]
    """
    going = count_of(fraction, sum(sizes))
    gone, before, result = progress * going, 0, []
    for size in sizes:
        mine = min(max(going - before, 0), size)
        share = min(max((gone - before) / mine, 0.0), 1.0) if mine else 0.0
        result.append((mine / size, share))
        before += mine
    return result


def count_of(fraction: float, number: int) -> int:
    """How many gates a fraction of `number` gates is, rounded up."""
    return math.ceil(fraction * number - 1e-6)  # 0.1 * 30 is 3.0000000000000004


def groups_in_order(sites: Sites, order: str | Sequence[str]) -> list[list[GatedActivation]]:
    """Groups of units in the order in which they are to be transferred.

    Args:
        sites: the units of a model, by path.
        order: as in `TransferSchedule`.

    Raises:
        ValueError: a glob matches none of the sites that earlier globs left, or no glob matches a
            site.
    """
    if not isinstance(order, str):
        return _groups_of_globs(sites, order)
    # A model may hold several converted ones, which go in the order of its modules.
    roots = {path: path.removesuffix(unit.path) for path, unit in sites.items()}
    place = {root: number for number, root in enumerate(dict.fromkeys(roots.values()))}
    paths = sorted(sites, key=lambda path: (place[roots[path]], sites[path].position))
    units = [sites[path] for path in paths]
    if order == "joint":
        return [units]
    # One group per stage; one per site where no stages are known.
    stages: dict[tuple[str, str], list[GatedActivation]] = {}
    for path in paths:
        stages.setdefault((roots[path], sites[path].stage), []).append(sites[path])
    groups = list(stages.values()) if len(stages) > 1 else [[unit] for unit in units]
    return groups if order == "front_to_back" else groups[::-1]


def _groups_of_globs(sites: Sites, globs: Sequence[str]) -> list[list[GatedActivation]]:
    left = dict(sites)
    groups = []
    for glob in globs:
        chosen = {
            path: unit
            for path, unit in left.items()
            if matches_glob(path, glob) or matches_glob(unit.path, glob)
        }
        if not chosen:
            raise ValueError(
                f"order: {glob!r} matches none of the sites that are left: {', '.join(left)}."
            )
        groups.append(list(chosen.values()))
        left = {path: unit for path, unit in left.items() if path not in chosen}
    if left:
        raise ValueError(f"order: no glob matches {', '.join(left)}; add '*' as the last one.")
    return groups
