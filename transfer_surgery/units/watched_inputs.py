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

    No hooks: compiled code runs those that it knows, copies take them along, and `bake` hands them
    on. What compiled code was made for units that nobody watched is compiled anew.

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
