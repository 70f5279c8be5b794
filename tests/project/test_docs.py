"""Every code block of README, CONTRIBUTING and docs runs; none is in a language that does not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.helpers.documents import blocks_of_no_known_language, run_page

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",  # Lightning
    "ignore:a gate saw fewer than 30 values",  # a user's batches are four images here
    "ignore:less than 50% of the variance is explained",  # by ReLU of random weights
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning 2.6.6 with torch 2.15
)
ROOT = Path(__file__).parents[2]
# They show the commands that made them.
GENERATED = ("controller.md", "coverage.md", "coverage_others.md", "coverage_transformers.md")
GENERATED += ("paper.md",)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SLOW = [ROOT / "docs" / n for n in ("cli.md", "recipes/deploy.md", "recipes/private_inference.md")]
WITH_CODE = [
    pytest.param(
        page, marks=[pytest.mark.slow] if page in SLOW else [], id=str(page.relative_to(ROOT))
    )
    for page in PAGES
    if "```" in page.read_text()
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_code_block_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch)


def test_no_block_of_a_page_escapes() -> None:
    written = [page for page in PAGES if page.name not in GENERATED]
    found = {name(page): blocks_of_no_known_language(page.read_text()) for page in written}
    assert {page: blocks for page, blocks in found.items() if blocks} == {}


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run_page(page, monkeypatch)
    page.write_text("```bash\ntransfer-surgery plan no_such_model\n```\n")
    with pytest.raises(AssertionError, match="no_such_model"):
        run_page(page, monkeypatch)
    page.write_text("```python\n>>> 1 + 1\n3\n\n```\n")
    with pytest.raises(Exception, match="Expected"):
        run_page(page, monkeypatch)


@pytest.mark.parametrize(
    "text", ["```sh\nrm\n```\n", "text\n\n    make test\n", "<!--- skip: next -->\n"]
)
def test_a_block_of_another_language_is_found(text: str) -> None:
    assert blocks_of_no_known_language(text) != []


def test_every_picture_is_drawn_by_the_program_that_says_so(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs" / "draw.py"))["main"](tmp_path)
    drawn = {picture.name for picture in tmp_path.iterdir()}
    assert drawn == {picture.name for picture in (ROOT / "docs" / "pictures").iterdir()}
    assert drawn == set(re.findall(r"\(pictures/(.+?)\)", (ROOT / "docs/concepts.md").read_text()))
