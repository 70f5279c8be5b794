"""benchmarks/speed.py runs, and its memory column is what it says; no time is asserted."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from performance_table import main

KINDS = ("original", "gamma", "schedule")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "speed.py"
DOCS = Path(__file__).parents[2] / "docs"


def test_each_variant_has_a_row_and_recomputation_keeps_the_memory_of_the_original(tmp_path):
    options = ["--model", "test_resnet", "--batch-size", "2", "--image-size", "64"]
    options += ["--rounds", "3", "--threads", "1", "--table", str(tmp_path / "table.md")]
    subprocess.run([sys.executable, str(BENCHMARK), *options], check=True)
    page = (tmp_path / "table.md").read_text()
    training, inference = page.split("## ")[1:]
    rows = [line.strip("| ").split(" | ") for line in training.splitlines() if line[:2] == "| "]
    memory = {row[0]: float(row[4]) for row in rows[1:]}
    assert memory["original"] == 1
    assert memory["gated, mixed gates"] > 1.3
    assert memory["gated, mixed gates, recompute"] < 1.05
    assert memory["naive code, mixed gates"] > memory["gated, mixed gates"]
    beside = {row[0]: row[1] for row in rows[1:]}
    assert beside["gated, all gates 0"] == "plain sine"
    assert "| baked, mixed gates | original |" in inference
    assert f"benchmarks/speed.py {' '.join(options)}" in page
    assert "| baked, matched and folded | plain sine |" in inference


def test_bookkeeping_is_counted_and_timed(tmp_path):
    options = ["--model", "test_resnet", "--batch-size", "2", "--image-size", "64"]
    options += ["--rounds", "3", "--threads", "1", "--table", str(tmp_path / "table.md")]
    program = BENCHMARK.with_name("overhead.py")
    subprocess.run([sys.executable, str(program), *options], check=True)
    page = (tmp_path / "table.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:2] == "| "]
    launches = {row[0]: sum(map(int, row[1:])) for row in rows if row[0] in KINDS}
    assert launches["original"] < launches["gamma"] < 5 * launches["original"]
    assert launches["original"] < launches["schedule"] < 5 * launches["original"]
    shares = {row[0]: float(row[1].rstrip("%")) for row in rows if row[-1].endswith("%")}
    assert set(shares) == {"sampling, forward and backward", "risk", "projection"}
    assert all(0 < share < 100 for share in shares.values())


def test_the_page_is_made_of_the_tables():
    page = DOCS / "performance.md"
    with TemporaryDirectory() as folder:
        copied = Path(folder) / "performance"
        shutil.copytree(DOCS / "performance", copied)
        main(copied)
        assert page.read_text() == copied.with_suffix(".md").read_text()


def test_missed_targets_are_said(tmp_path):
    (tmp_path / "performance").mkdir()
    table = tmp_path / "performance" / "cpu-net.md"
    table.write_text(
        "# T\n\n## net, training step, batch 8\n\n"
        "| network | beside | time | middle half | memory |\n"
        "|---|---|---|---|---|\n"
        "| gated, mixed gates | original | 1.400 | 1.3 to 1.5 | 1.430 |\n"
        "| gated, all gates 1 | original | 1.010 | 1.0 to 1.1 | 1.000 |\n"
        "\n## net, inference, batch 8\n\n"
        "| baked, all gates 0 | plain sine | 1.001 | 1.0 to 1.1 | - |\n"
    )
    main(tmp_path / "performance")
    page = (tmp_path / "performance.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| [net]"))
    assert row.startswith("| [net](performance/cpu-net.md) | 1.01 | 1.40 (+0.15) | - |")
    assert row.endswith("| 1.43 | - | 1.00 | - | - |")
    assert "Not measured: no GPU" in page
