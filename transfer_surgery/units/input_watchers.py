"""See what units get, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from transfer_surgery.units.gated_activation import GatedActivation


@contextmanager
def watched_inputs(
    units: Iterable[GatedActivation], look: Callable[[GatedActivation, Tensor], object]
) -> Iterator[None]:
    """Show what units get, before they compute anything of it.

    These are no hooks: `torch.compile` ignores those that come later, copies would keep them, and
    `bake` would hand them on. It guards on what watches a unit, and compiles anew where that
    changes.

    Args:
        units: those to watch.
        look: gets the unit and its input, in each call.
    """
    units = list(units)
    for unit in units:
        unit.watchers += (look,)
    try:
        yield
    finally:
        for unit in units:
            unit.watchers = tuple(one for one in unit.watchers if one is not look)
