"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells under each other, the first ``left`` columns to the left, others to the right.

    Examples:
        >>> print(columns([("path", "KL"), ("layer1.relu", "0.5")], left=1))
        path          KL
        layer1.relu  0.5
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
