"""``paper.py`` as a user runs it from a shell, also where it cannot work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiments import EXPERIMENTS, QUICK
from networks import ROWS
from paper import app
from studies import STUDIES, Study
from typer.testing import CliRunner

PAPER = Path(__file__).parents[1] / "paper.py"


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text())
    return data


@pytest.mark.slow  # a process; in this one, the commands are tested below
def test_the_program_runs_from_any_folder_and_its_help_names_all_commands(tmp_path: Path) -> None:
    command = [sys.executable, str(PAPER), "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    for name in ("figure1", "figure2", "table1", "precision", "study", "document"):
        assert name in printed.stdout


def test_figure1_writes_numbers_and_picture(tmp_path: Path) -> None:
    small = [f"--set={text}" for text in ("steps=300", "seeds=2", "gate_lr=0.2", "points=65")]
    assert "resin->sin" in succeed("figure1", *small, "--out", tmp_path)
    assert read(tmp_path / "figure1.json")["settings"]["seeds"] == 2
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_figure2_trains_what_is_asked_for_and_nothing_twice(tmp_path: Path) -> None:
    options = ["--quick", "--set", "epochs=2", "--name", "tiny", "--out", tmp_path, "--workers", 1]
    succeed("figure2", *options, "--row", "sin")
    printed = succeed("figure2", *options, "--row", "relu-to-sin")
    # The network of the first call is in the table of the second one.
    assert [run["row"] for run in read(tmp_path / "tiny.json")["runs"]] == ["sin", "relu->sin"]
    assert "| `sin` |" in printed
    assert (tmp_path / "tiny.png").exists()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny").iterdir()}
    assert len(times) == 2
    printed = succeed("figure2", *options, "--minutes", 0)
    assert "8 trainings are left" in printed
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny").iterdir()} == times
    wrong = invoke("figure2", *options, "--row", "sin", "--set", "epochs=3")
    assert wrong.exit_code == 2
    assert "made with other settings" in wrong.output


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mnist", "resnet20"])
def test_table1_learns_from_real_images(task: str, data_folder: Path, tmp_path: Path) -> None:
    rows = ["--row", "relu", "--row", "relu-to-sin", "--precision", "bf16"]
    options = ["--quick", "--set", "epochs=1", "--set", "lr=0.05", "--out", tmp_path]
    printed = succeed("table1", task, *rows, *options)
    runs = read(tmp_path / f"{task}-quick.json")["runs"]
    assert [run["row"] for run in runs] == ["relu", "relu->sin"]
    # Chance is 90 %.
    assert all(run["conv"] < (10 if task == "mnist" else 85) for run in runs)
    assert "soft transfer beats its source" in printed


@pytest.mark.slow
def test_a_study_and_the_page_are_made_from_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(QUICK["bessel"], protocol=replace(QUICK["bessel"].protocol, epochs=2))
    lines = (((), ("resin", "resin->sin")), (("gamma=20",), ("resin->sin",)))
    monkeypatch.setitem(STUDIES, "bessel", Study(base, lines))
    succeed("study", "bessel", "--out", tmp_path, "--workers", 1)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin bessel-study.study -->\n<!-- end bessel-study.study -->\n")
    succeed("document", "--results", tmp_path, "--page", page, "--pictures", tmp_path)
    table = page.read_text().splitlines()[1:-1]
    assert table[0] == "| changed | `resin` | `resin->sin` |"
    assert [line.split("|")[1].strip() for line in table[2:]] == ["as settled", "gamma=20"]
    assert table[2].count("(1.00)") == 1  # E[z], of the network that has gates


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "imagenet"], "unknown task 'imagenet'. Known: bessel, mnist, resnet20"),
        (["table1", "mnist", "--row", "gelu"], "unknown network 'gelu'. Known: sin, resin"),
        (["table1", "mnist", "--set", "gama=1"], "write NAME=VALUE, where NAME is one of epochs"),
        (["table1", "mnist", "--precision", "fp8"], "use 'fp32', 'tf32' or 'bf16'"),
        (["figure1", "--set", "optimizer=adan"], "use 'adam' or 'sgd'"),
        (["study", "resnet1202"], "unknown study 'resnet1202'. Known: "),
        (["document", "--results", "nowhere"], "which is not there"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_run(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_settled_quick_and_studied_settings_are_of_the_same_networks() -> None:
    for name, quick in QUICK.items():
        assert quick.rows == EXPERIMENTS[name].rows
        assert len(quick.rows) == (2 if name == "resnet110" else len(ROWS))
    for study in STUDIES.values():
        experiments = study.experiments()
        settled = experiments.pop("as settled").protocol
        assert all(experiment.protocol != settled for experiment in experiments.values())
