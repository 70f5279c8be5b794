"""What each stage of a whole swap did to a network, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from transfer_surgery._table import Column, Table
from transfer_surgery.matching.output_errors import error_cell
from transfer_surgery.surgery import FoldReport

_SHOWN = 8  # sites that a note names


@dataclass(frozen=True)
class SwapStage:
    """The network after one stage, compared with the original one on the held-out inputs.

    Args:
        stage: what was done: ``"original"``, ``"swapped alone"``, ``"matched"`` or ``"matched,
            refitted"``, ``"distilled"``, ``"baked, folded"``.
        errors: relative squared error of each output: 0 is perfect, 1 is as good as the mean.
        divergence: mean KL divergence of the answers, if the outputs are logits.
        changed: share of the answers whose largest logit is not the original one, if they are
            logits.
        accuracy: share of right answers, where there are labels.
        zeros: share of exact zeros in what the chosen sites return.
        fitted: number of sites that compute with numbers of their own.
        seconds: what the stage took, without the comparison.
    """

    stage: str
    errors: Mapping[str, float]
    divergence: float | None
    changed: float | None
    accuracy: float | None
    zeros: float
    fitted: int
    seconds: float


@dataclass(frozen=True, repr=False)
class SwapReport(Table[SwapStage]):
    """What `swap_activations` did, stage by stage: a table.

    Args:
        rows: one per stage, the original network first.
        examples: number of inputs that the networks were compared on.
        numbers: for each site that still has numbers of its own after folding, why.
        kept: paths of the sites that keep their source, in the order in which they run.
        mixed: paths of the sites that keep it for a part of their gates, and compute both.
        left: layers behind a site that were not refitted, and why.
    """

    columns = (
        Column("stage"),
        Column("errors", "output error", error_cell),
        Column("changed", "answers changed", ".1%"),
        Column("accuracy", text=".2%"),
        Column("zeros", text=".1%"),
        Column("fitted", "own numbers"),
        Column("seconds", text=".0f"),
    )
    examples: int
    numbers: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [f"Compared on {self.examples:,} inputs that nothing was fitted to."]
        if not all(math.isfinite(error) for error in self.rows[-1].errors.values()):
            notes.append(
                "Outputs are not finite: some of these inputs leave the range of the fit, as those "
                "of polynomials do, and grow from site to site. Give distill_steps=, more inputs, "
                "a target of a higher degree, or keep some sources."
            )
        if self.numbers:
            named = _named([f"{path} ({why})" for path, why in self.numbers.items()])
            notes.append(f"{_sites(len(self.numbers))} numbers of {_own(self.numbers)}: {named}.")
        for paths, what in ((self.kept, "their source"), (self.mixed, "a part of their source")):
            if paths:
                notes.append(f"{_sites(len(paths))} {what}: {_named(paths)}.")
        if self.left:
            named = _named([f"{path} {why}" for path, why in self.left.items()])
            notes.append(f"Layers that were not refitted: {named}.")
        return tuple(notes)


def _sites(count: int) -> str:
    return "1 site keeps" if count == 1 else f"{count} sites keep"


def _own(numbers: Mapping[str, str]) -> str:
    return "its own" if len(numbers) == 1 else "their own"


def _named(names: tuple[str, ...] | list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def why_numbers_stay(folded: FoldReport) -> dict[str, str]:
    """For each site that still has numbers after folding: which ones, and why."""
    reasons = {}
    for row in folded:
        if row.left:
            found = [name.strip("()") for name in (row.before, row.after) if name.startswith("(")]
            # A layer is there, but it pads its input with zeros, to which `b` was not added.
            why = " and ".join(dict.fromkeys(found)) or f"{row.after} pads with zeros"
            reasons[row.path] = f"{row.left}: {why}"
    return reasons
