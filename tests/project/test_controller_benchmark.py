"""benchmarks/controller.py, in small: every optimizer and learning rate keeps to the schedule."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "controller.py"


@pytest.mark.slow
def test_the_table_says_that_the_projection_is_exact_everywhere(tmp_path: Path) -> None:
    table = tmp_path / "controller.md"
    options = ["--steps", "10", "--models", "resnet10t", "--threads", "1", "--table", str(table)]
    subprocess.run([sys.executable, str(BENCHMARK), *options], check=True)
    text = table.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| resnet10t")]
    assert len(rows) == 15  # five optimizers, three learning rates
    assert all(float(row[3]) <= 0.01 for row in rows)
    assert all(row[4] == "100.0%" for row in rows)
    (worst,) = re.findall(r"projection ([\d.]+), auto", text)
    assert float(worst) == max(float(row[3]) for row in rows)
