"""Pages that are made of results say what is in the files that are committed."""

import json
import shutil
from pathlib import Path

import deploy_table
import everyday_table
import performance_table
import pretrained_table
import pytest
from markdown_page import fill_blocks
from pretrained_recipes import Recipe

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("pretrained", pretrained_table),
        ("swaps", pretrained_table),
        ("everyday", everyday_table),
        ("deploy", deploy_table),
    ],
)
def test_the_page_is_made_of_the_files(page, table):
    text = (DOCS / f"{page}.md").read_text()
    results = table.read_results(RESULTS / page)
    assert len(results) > 3
    assert table.fill(text, results) == text


def test_the_page_on_performance_is_made_of_the_tables(tmp_path):
    folder = tmp_path / "performance"
    shutil.copytree(DOCS / "performance", folder)
    performance_table.main(folder)
    assert folder.with_suffix(".md").read_text() == (DOCS / "performance.md").read_text()


def test_result_files_are_named_after_what_they_hold():
    for study in ("pretrained", "swaps"):
        for file in (RESULTS / study).glob("*.json"):
            assert Recipe(**json.loads(file.read_text())["recipe"]).name == file.stem
    for file in (RESULTS / "deploy").glob("*.json"):
        recipe = deploy_table.Recipe(**json.loads(file.read_text())["recipe"])
        assert recipe.name == file.stem
    for file in (RESULTS / "everyday").glob("*.json"):
        found = json.loads(file.read_text())
        assert file.stem == f"{found['swap']}-seed{found['seed']}"


def test_a_block_is_filled_where_its_marks_are_and_nowhere_else():
    page = "a\n<!-- begin one -->\nold\n<!-- end one -->\n<!-- begin two -->\n<!-- end two -->\n"
    filled = fill_blocks(page, {"one": "new\n"})
    assert filled == page.replace("\nold\n", "\n\nnew\n\n")
    with pytest.raises(ValueError, match="no block 'three', but one, two"):
        fill_blocks(page, {"three": "new"})


def test_times_are_ratios_to_the_original_network_wherever_it_stands():
    names = [deploy_table.Recipe("yolo", start).name for start in ("refitted", "original")]
    times = deploy_table.Latency("yolo", 1, {names[0]: [1.0, 0.5], names[1]: [2.0, 4.0]}, "CPU")
    found = deploy_table._times([times])
    assert "| refitted | 0.50 | 0.25 |" in found
    assert "| original | 1.00 | 2.00 |" in found
