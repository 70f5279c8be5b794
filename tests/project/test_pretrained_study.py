"""benchmarks/pretrained.py: recipes have files of their own, and the page says what is in them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pretrained_recipes import Recipe
from pretrained_table import Result, fill, read_results, write_tables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DOCS = Path(__file__).parents[2] / "docs"
RESULTS = BENCHMARKS / "results"


def result(error: float, **recipe) -> Result:
    trained = 90.0 if recipe.get("steps") else 0.0
    return Result(Recipe(**recipe), error, 1.0, 30.0, trained, [2.0, 1.0], "CPU")


@pytest.mark.parametrize("name", ["pretrained", "swaps"])
def test_the_page_is_made_of_the_files(name):
    page = (DOCS / f"{name}.md").read_text()
    assert fill(page, read_results(RESULTS / name)) == page
    assert "## ResNet-20" in page


@pytest.mark.parametrize("name", ["pretrained", "swaps"])
def test_files_are_named_after_what_they_hold(name):
    for file in (RESULTS / name).glob("*.json"):
        assert Recipe(**json.loads(file.read_text())["recipe"]).name == file.stem


def test_seeds_share_a_row_and_the_best_recipe_is_on_top():
    several = [result(0.10, seed=0), result(0.12, seed=1), result(0.09, start="refitted")]
    page = write_tables([*several, result(0.2, steps=390), result(0.3, depth=56, steps=400)])
    rows = [line for line in page.splitlines() if line.startswith(("| matched", "| refitted"))]
    assert rows == [
        "| refitted | hard | - | - | 9.00% | - | 100% | 0.5 min | - |",
        "| matched | hard | - | - | 11.00% ± 1.41% (2 seeds) | - | 100% | 0.5 min | - |",
        "| matched | hard | labels | sgd 0.02 | 20.00% | 2.00 | 100% | 0.5 min | 1.5 min |",
        "| matched | hard | labels | sgd 0.02 | 30.00% | 2.00 | 100% | 0.5 min | 1.5 min |",
    ]
    assert "`resnet20-matched-0steps-seed0` and on: 10.00%, 12.00%." in page.splitlines()
    sections = [line for line in page.splitlines() if line.startswith("##")]
    assert sections == [
        "## ResNet-20, no training",
        "## ResNet-20, 1 epoch",
        "## ResNet-56, 400 steps",
    ]


def test_a_training_that_diverged_is_named():
    page = write_tables([replace(result(0.9, steps=390, lesson="both"), losses=[2.0, None])])
    assert "| both | sgd 0.02 | 90.00% | diverged | 100% | 0.5 min | 1.5 min |" in page


def grid(*options):
    command = [sys.executable, str(BENCHMARKS / "pretrained.py"), "grid", *options]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


def test_the_grid_has_each_recipe_once_and_leaves_out_what_is_done(tmp_path):
    everything = grid("--epochs", "1", "--seeds", "2", "--folder", str(tmp_path))
    assert len(set(everything)) == len(everything) > 20
    assert all(" run --depth 20 " in line for line in everything)
    done = Recipe(start="refitted", lesson="teacher", steps=390, seed=1, opt="adamw", lr=1e-3)
    (tmp_path / f"{done.name}.json").write_text("{}")
    rest = grid("--epochs", "1", "--seeds", "2", "--folder", str(tmp_path))
    (gone,) = set(everything) - set(rest)
    assert "--start refitted" in gone
    assert "--lesson teacher" in gone
    assert "--seed 1" in gone


@pytest.mark.parametrize("epochs", ["0", "2"])
def test_the_best_recipe_and_its_baseline_are_of_the_grid(epochs, tmp_path):
    options = ("--depth", "56", "--epochs", epochs, "--folder", str(tmp_path))
    relu, best = grid(*options, "--best")
    assert "--start relu" in relu
    assert "--start refitted" in best
    assert {relu, best} < set(grid(*options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--start", "refitted", "--lesson", "teacher", "--opt", "adamw", "--lr", "0.001"],
        ["--start", "refitted", "--lesson", "both", "--weights", "gradient"],
        ["--start", "matched", "--transfer", "soft", "--order", "sensitivity"],
        ["--start", "plain", "--transfer", "line"],
        ["--start", "relu"],
        ["--start", "refitted", "--target", "polynomial", "--keep", "0.5", "--lr", "0.001"],
    ],
    ids=" ".join,
)
def test_each_kind_of_recipe_runs(options, data_folder, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "pretrained.py"), "run", *options]
    command += ["--images", "128", "--steps", "3", "--threads", "1", "--folder", str(tmp_path)]
    subprocess.run(command, check=True)
    (found,) = read_results(tmp_path)
    assert len(found.losses) == 3
    if "--keep" in options:  # of the gates: half the neurons are another share
        assert 0.1 < found.transferred < 0.9
    else:
        assert found.transferred == (0 if "relu" in options else 1)
    assert found.error < (0.95 if "plain" in options else 0.2)
