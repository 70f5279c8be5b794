"""benchmarks/everyday_swaps.py at toy size, and the page that it fills."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from everyday_table import PAGE, RESULTS, STARTS, Result, Row, fill, read_results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SWAPS = [
    *("silu-hardswish", "gelu-relu", "tanh-hardtanh"),
    *("gelu-sin-vit", "gelu-sin-convnext"),
]


def result(seed: int, error: float) -> Result:
    rows = [Row(start, error, 0.01, 0.5, error / 2, 0.25, 3, 1.6) for start in STARTS]
    return Result("gelu-relu", seed, 936, 150, 512, rows, "CPU")


def test_the_tables_of_the_page_are_made_of_the_files():
    page = PAGE.read_text()
    assert fill(page, read_results(RESULTS)) == page
    assert re.findall(r"<!-- begin (\S+) -->", page) == SWAPS


def test_files_are_named_after_what_they_hold():
    files = sorted(RESULTS.glob("*.json"))
    for file, found in zip(files, read_results(RESULTS), strict=True):
        assert file.stem == f"{found.swap}-seed{found.seed}"


def test_seeds_share_a_table():
    page = "before\n<!-- begin gelu-relu -->\nstale\n<!-- end gelu-relu -->\nafter\n"
    filled = fill(page, [result(0, 0.02), result(1, 0.04)])
    lines = filled.splitlines()
    assert lines[:2] + lines[-2:] == [*page.splitlines()[:2], *page.splitlines()[-2:]]
    assert lines[4].startswith(
        "| original | 3.00 ± 1.41 % | 1.00 ± 0.00 % | 50.0 ± 0.0 % | 1.50 ± 0.71 % |"
    )
    assert lines[6].startswith("| matched")
    assert lines[6].endswith("| 3 sites | 2 |")
    assert "stale" not in filled
    assert "2 seeds" in filled
    with pytest.raises(ValueError, match="no result of gelu-relu"):
        fill(page, [])


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS)
def test_each_swap_runs(swap, data_folder, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "everyday_swaps.py"), "run", swap]
    command += ["--steps", "20", "--tune-steps", "2", "--images", "128", "--limit", "512"]
    subprocess.run([*command, "--folder", str(tmp_path)], check=True)
    (found,) = read_results(tmp_path)
    assert [row.start for row in found.rows] == list(STARTS)
    assert found.rows[0].zeros < 0.1
    if swap == "gelu-relu":
        assert all(row.zeros > 0.2 and row.left == 0 for row in found.rows[1:])
