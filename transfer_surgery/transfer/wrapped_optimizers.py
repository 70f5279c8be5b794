"""Which optimizers are wrapped, and which one is inside of which."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from transfer_surgery.transfer.step_hooks import StepHooks
from transfer_surgery.units import GatedActivation

WRAPPED: WeakKeyDictionary[Optimizer, StepHooks] = WeakKeyDictionary()

# The names under which other optimizers keep the one that they wrap: Accelerate and Lightning, SAM,
# timm's Lookahead, and opacus.
_INNER = ("optimizer", "base_optimizer", "_base_optimizer", "original_optimizer")


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` updates the parameters, inside of those that wrap it."""
    inner = (getattr(optimizer, name, None) for name in _INNER)
    found = next((o for o in inner if isinstance(o, Optimizer) and o is not optimizer), None)
    return optimizer if found is None else innermost(found)


def earlier_hooks(optimizer: Optimizer, sites: dict[str, GatedActivation]) -> list[StepHooks]:
    """The hooks of earlier optimizers for these gates, which this optimizer replaces.

    Raises:
        ValueError: an earlier optimizer trains other parameters, so that both will be used.
    """
    ours = {id(unit) for unit in sites.values()}

    def moving() -> list[tuple[Optimizer, StepHooks]]:
        return [
            (other, hooks)
            for other, hooks in WRAPPED.items()
            if not hooks.is_retired and not ours.isdisjoint(map(id, hooks.units.values()))
        ]

    if moving():
        gc.collect()  # learning-rate schedulers keep dead optimizers alive in reference cycles
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for other, hooks in moving():
        theirs = {id(p) for group in other.param_groups for p in group["params"]}
        if held.isdisjoint(theirs):
            moved = [path for path, unit in hooks.units.items() if id(unit) in ours]
            raise ValueError(
                f"another optimizer ({type(other).__name__}) that is wrapped already moves the "
                f"gates of {', '.join(moved[:3])}{', ...' if len(moved) > 3 else ''}: they would "
                "move twice per step. Wrap one optimizer only, or each with the submodule that it "
                "trains."
            )
    return [hooks for _, hooks in moving()]


def tell_schedules(units: Iterable[GatedActivation]) -> None:
    """Let schedules know that these gates were moved at once: a step that undoes it will warn."""
    told = set(units)
    for hooks in WRAPPED.values():
        if hooks.projection is not None and not hooks.is_retired:
            hooks.projection.swapped |= told.intersection(hooks.units.values())
