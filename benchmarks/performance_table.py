"""docs/performance.md: the ratios of all tables that benchmarks/speed.py wrote, beside the targets.

python benchmarks/performance_table.py docs/performance
"""

from __future__ import annotations

from pathlib import Path

import typer
from markdown_page import markdown_table
from variants import UNITS_COMPILED

HEAD = """# What gated activations cost

`python benchmarks/performance_table.py {folder}` writes this page from the tables in
`docs/performance/`. `bash benchmarks/cpu.sh` makes those, and `bash benchmarks/gpu.sh` on a machine
with a GPU. All variants of a network take turns, round by round. Each number is the median over the
rounds of a variant's time divided by that of its baseline in the same round. A number in brackets
says by how much a target is missed.
"""
# Column, section, row in the tables of speed.py, column there, and the targets on CPU and GPU.
COLUMNS = (
    ("plain sine", "training step", "plain sine", "time", None),
    ("all gates 1", "training step", "gated, all gates 1", "time", (1.05, 1.05)),
    ("mixed", "training step", "gated, mixed gates", "time", (1.25, 1.10)),
    ("mixed, units compiled", "training step", UNITS_COMPILED, "time", (1.15, 1.10)),
    ("all gates 0", "training step", "gated, all gates 0", "time", (1.05, 1.05)),
    ("naive code, mixed", "training step", "naive code, mixed gates", "time", None),
    ("mixed, compiled", "training step", "gated, mixed gates, compiled", "time", (None, 1.03)),
    ("memory", "training step", "gated, mixed gates", "memory", None),
    ("memory, recompute", "training step", "gated, mixed gates, recompute", "memory", (1.02, 1.02)),
    ("baked", "inference", "baked, all gates 0", "time", (1.02, 1.02)),
    ("matched, baked", "inference", "baked, matched targets", "time", None),
    ("matched, folded", "inference", "baked, matched and folded", "time", None),
)
# Where activations are a larger part of the network, compiled units may cost more.
OWN_TARGETS = {
    ("cpu-efficientnet_b0", UNITS_COMPILED): 1.25,
    ("cpu-cifar_resnet20", UNITS_COMPILED): 1.45,
}
NOTES = """
*Mixed* has eager units; *mixed, units compiled* has compiled ones, as in long runs, and its CPU
target is 1.25 for efficientnet_b0 and 1.45 for cifar_resnet20. CPUs are measured with glibc's
settings that keep freed memory in the process (`benchmarks/cpu.sh` has them and the reason).
The baseline is the network as it was. For *all gates 0*, *baked* and *matched* it is the network
with plain sines, and for *compiled* the compiled network as it was. Memory is what waits for the
backward pass. `-` stands for what was not measured. Each network's page has the date of its run.
*plain sine* is the network with plain sines beside the network as it was: a mixed unit computes
both activations, so it cannot be much cheaper than that.
"""


def main(folder: Path) -> None:
    """Write FOLDER.md."""
    text = HEAD.format(folder=f"docs/{folder.name}") + "\n"
    for place, (device, title) in enumerate((("cpu", "CPU"), ("gpu", "GPU"))):
        text += f"## {title}\n\n"
        tables = sorted(folder.glob(f"{device}-*.md"))
        timed = [file for file in tables if "training step" in file.read_text()]
        if not timed:
            text += "This has not been measured yet. `bash benchmarks/gpu.sh` does it.\n"
            continue
        rows = [[_link(file), *_cells(file, place)] for file in timed]
        targets = [column[4][place] if column[4] else None for column in COLUMNS]
        rows.append(["target", *("-" if t is None else f"{t:.2f}" for t in targets)])
        text += markdown_table(["network", *(column[0] for column in COLUMNS)], rows) + "\n"
        others = [_link(file) for file in tables if file not in timed]
        text += NOTES + (f"\nMore: {', '.join(others)}.\n\n" if others else "\n")
    folder.with_suffix(".md").write_text(text.rstrip() + "\n")


def _cells(file: Path, place: int) -> list[str]:
    found = ratios(file.read_text())
    cells = []
    for _, section, row, column, targets in COLUMNS:
        value = found.get((section, row, column))
        target = OWN_TARGETS.get((file.stem, row), targets[place] if targets else None)
        missed = value is not None and target is not None and value > target
        excess = f" (+{value - target:.2f})" if missed else ""
        cells.append("-" if value is None else f"{value:.2f}{excess}")
    return cells


def ratios(page: str) -> dict[tuple[str, str, str], float]:
    """Of one page of speed.py: section, row and column to the number."""
    found = {}
    for section in page.split("\n## ")[1:]:
        kind = section.split(", ")[1]
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            if line.startswith("| ") and len(cells) == 5 and cells[0] != "network":
                for column, cell in (("time", cells[2]), ("memory", cells[4])):
                    if cell != "-":
                        found[kind, cells[0], column] = float(cell)
    return found


def _link(file: Path) -> str:
    return f"[{file.stem.partition('-')[2]}](performance/{file.name})"


if __name__ == "__main__":
    typer.run(main)
