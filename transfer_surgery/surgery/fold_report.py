"""What `fold_targets` moved, and what it left where it was."""

from __future__ import annotations

from dataclasses import dataclass

from transfer_surgery._table import Column, Table


@dataclass(frozen=True)
class FoldRow:
    """One site.

    Args:
        path: of its module.
        before: the layer that took ``w`` and ``c``, or why none could.
        after: the layer that took ``a``, and maybe ``b``, or why none could.
        left: which of ``a``, ``w``, ``c`` and ``b`` the module still has.
        added: parameters that the model did not have before: biases.
    """

    path: str
    before: str
    after: str
    left: str
    added: str = ""


@dataclass(frozen=True, repr=False)
class FoldReport(Table[FoldRow]):
    """Which numbers moved to which layers: a table.

    Args:
        rows: a row per site.
        parameters_before: number of parameters of the whole model.
        parameters_after: the same after folding.
    """

    columns = (
        Column("path"),
        Column("before", "w, c went to"),
        Column("after", "a, b went to"),
        Column("left", text=lambda left: left or "-"),
    )
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        if not self.rows:
            return "no site has a fitted target alone: there is nothing to fold"
        return super().__str__()

    @property
    def notes(self) -> tuple[str, ...]:
        count = f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after"
        added = [row.added for row in self if row.added]
        if not added:
            return (count,)
        return count, f"new, not known to an optimizer made before: {', '.join(added)}"
