"""Each benchmark that makes a page of the docs runs, at toy size; no time is asserted."""

import subprocess
import sys
from pathlib import Path

import deploy_table
import everyday_table
import pretrained_table
import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(program: str, *options: object) -> None:
    command = [sys.executable, str(BENCHMARKS / program), *map(str, options)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("program", ["speed.py", "overhead.py"])
def test_a_training_step_is_measured(program: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    options = ("--model", "test_resnet", "--batch-size", 2, "--image-size", 64, "--rounds", 3)
    run(program, *options, "--threads", 1, "--table", page)
    assert "| original |" in page.read_text()


@pytest.mark.parametrize(
    "swap",
    [
        "gelu-relu",
        pytest.param("gelu-sin-vit", marks=pytest.mark.long),
        pytest.param("gelu-polynomial-vit", marks=pytest.mark.long),
    ],
)
def test_an_everyday_swap_runs(swap: str, data_folder: Path, tmp_path: Path) -> None:
    options = ("--steps", 20, "--tune-steps", 2, "--images", 128, "--limit", 512)
    run("everyday_swaps.py", "run", swap, *options, "--folder", tmp_path)
    (found,) = everyday_table.read_results(tmp_path)
    assert [row.start for row in found.rows] == list(everyday_table.STARTS)
    if swap == "gelu-relu":
        # A matched ReLU has few zeros: docs/everyday.md.
        assert all(row.zeros > 0.05 and row.left == 0 for row in found.rows[1:])


@pytest.mark.parametrize(
    "options",
    [
        ["--lesson", "teacher", "--opt", "adamw", "--lr", "0.001"],
        pytest.param(
            ["--target", "polynomial", "--keep", "0.5", "--lr", "0.001"], marks=pytest.mark.long
        ),
    ],
    ids=" ".join,
)
def test_a_recipe_for_pretrained_networks_runs(
    options: list[str], data_folder: Path, tmp_path: Path
) -> None:
    small = ("--images", 128, "--steps", 3, "--threads", 1, "--folder", tmp_path)
    run("pretrained.py", "run", "--start", "refitted", *options, *small)
    (found,) = pretrained_table.read_results(tmp_path)
    assert len(found.losses) == 3
    assert found.error < 0.2
    if "--keep" in options:  # of the gates: half the neurons are another share
        assert 0.1 < found.transferred < 0.9
    else:
        assert found.transferred == 1


def test_a_network_is_swapped_for_int8(data_folder: Path, tmp_path: Path) -> None:
    small = ("--limit", 300, "--cache", tmp_path / "cache")
    results = ("--folder", tmp_path / "results")
    run("deploy.py", "train", "yolo", "--epochs", 1, *small)
    run("deploy.py", "run", "--network", "yolo", "--start", "original", *small, *results)
    how = ("--lesson", "teacher", "--steps", 2, "--images", 128)
    run("deploy.py", "run", "--network", "yolo", *how, *small, *results)
    run("deploy.py", "latency", "yolo", "--rounds", 2, *small[2:], *results)
    original, distilled, times = deploy_table.read_results(tmp_path / "results")
    assert original.changed == original.zeros == 0
    assert distilled.zeros > 0.2
    assert all(0 < result.int8_error < 1 for result in (original, distilled))
    assert list(times.milliseconds) == [original.recipe.name]
    page = tmp_path / "page.md"
    blocks = ("summary", "yolo", "yolo-latency", "settings")
    page.write_text("\n".join(f"<!-- begin {x} -->\n<!-- end {x} -->" for x in blocks))
    run("deploy.py", "table", "--page", page, *results)
    assert "| original |" in page.read_text()
