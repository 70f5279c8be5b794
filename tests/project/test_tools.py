"""The tools of docs/tools.md that are installed here, on a network in each of its states."""

import int8
import pytest
import torch
from tool_checks import networks
from tool_checks.__main__ import TOOLS, Tool, installed, outcome, table

pytestmark = pytest.mark.slow
REFUSED = {("`torch.jit.script`", "converted"), ("gradients per example", "converted")}


@pytest.mark.parametrize("state", networks.STATES)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: f"{tool.package} {tool.name}")
def test_a_tool_works_or_is_refused(tool: Tool, state: str) -> None:
    if not installed(tool.package):
        pytest.skip(f"needs {tool.package}; benchmarks/tools.sh installs it")
    expected = "refused" if (tool.name, state) in REFUSED else "works"
    assert outcome(tool, state).partition(":")[0] == expected


@pytest.mark.parametrize("state", networks.STATES)
def test_the_reference_computes_what_the_network_does(state: str) -> None:
    case = networks.case(state)
    torch.testing.assert_close(case.network(case.images), case.reference(case.images))


def test_a_wrong_answer_is_told_from_a_refusal() -> None:
    def wrong(case: networks.Case) -> None:
        torch.testing.assert_close(case.network(case.images), case.images)

    (cell,) = {outcome(Tool("a tool", "torch", wrong), state) for state in networks.STATES[:1]}
    assert cell.startswith("wrong: AssertionError")
    assert "wrong (1)" in table({Tool("a tool", "torch", wrong): [cell] * 4})


def test_int8_of_a_swapped_network_is_that_of_one_built_with_relu(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["int8.py", "--epochs", "1", "--rounds", "1"])
    int8.main()
    *_, swapped, built = capsys.readouterr().out.strip().splitlines()
    assert swapped.split("|")[2:5] == built.split("|")[2:5]
    assert swapped.split("|")[2].strip() == "2"
