"""examples/quickstart.ipynb runs from top to bottom, and a cell that raises is a failure."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def execute(notebook: nbformat.NotebookNode) -> str:
    """What a notebook prints, in a kernel of this Python."""
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs_and_its_converted_network_is_bit_identical(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads wait for each other on a busy machine
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    printed = execute(notebook)
    assert "outputs identical, bit for bit: True" in printed
    assert "100% of the gates are transferred" in printed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_a_cell_that_raises_is_a_failure() -> None:
    cells = [nbformat.v4.new_code_cell("assert 1 + 1 == 3")]
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(nbformat.v4.new_notebook(cells=cells))


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
