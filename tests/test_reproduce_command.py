"""``transfer-surgery reproduce`` as a user runs it from a shell, also where it cannot work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transfer_surgery.reproduce.command import reproduce
from transfer_surgery.reproduce.experiments import EXPERIMENTS, QUICK
from transfer_surgery.reproduce.rows import ROWS
from transfer_surgery.reproduce.studies import STUDIES, Study

COMMAND = Path(sys.executable).with_name("transfer-surgery")


def command(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    wide = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)], capture_output=True, text=True, env=wide, cwd=folder
    )


def succeed(*arguments: object, folder: Path | None = None) -> str:
    result = command(*arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


def read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text())
    return data


def test_help_names_a_command_per_figure_and_table() -> None:
    printed = succeed("reproduce", "--help")
    for name in ("figure1", "figure2", "table1", "study", "document"):
        assert name in printed


def test_figure1_writes_numbers_and_picture(tmp_path: Path) -> None:
    small = [f"--set={text}" for text in ("steps=300", "seeds=2", "gate_lr=0.2", "points=65")]
    printed = succeed("reproduce", "figure1", *small, "--out", tmp_path)
    assert "resin->sin" in printed
    assert read(tmp_path / "figure1.json")["settings"]["seeds"] == 2
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")


def test_figure2_runs_all_ten_networks_and_does_none_of_them_twice(tmp_path: Path) -> None:
    options = ["--quick", "--set", "epochs=2", "--name", "tiny", "--out", tmp_path, "--workers", 2]
    printed = succeed("reproduce", "figure2", *options)
    names = [row.name for row in ROWS]
    assert [run["row"] for run in read(tmp_path / "tiny.json")["runs"]] == names
    assert all(f"| `{name}` |" in printed for name in names)
    assert (tmp_path / "tiny.png").exists()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny").iterdir()}
    assert len(times) == 10
    assert succeed("reproduce", "figure2", *options).count("error") >= 10
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny").iterdir()} == times
    wrong = command("reproduce", "figure2", *options[:1], "--set", "epochs=3", *options[3:])
    assert wrong.returncode == 2
    assert "made with other settings" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mnist", "resnet20"])
def test_table1_learns_from_real_images(task: str, data_folder: Path, tmp_path: Path) -> None:
    rows = ["--row", "relu", "--row", "relu-to-sin"]
    options = ["--quick", "--set", "epochs=1", "--set", "lr=0.05", "--out", tmp_path]
    printed = succeed("reproduce", "table1", task, *rows, *options)
    runs = read(tmp_path / f"{task}-quick.json")["runs"]
    assert [run["row"] for run in runs] == ["relu", "relu->sin"]
    # Chance is 90 %.
    assert all(run["conv"] < (10 if task == "mnist" else 85) for run in runs)
    assert "soft transfer beats its source" in printed
    assert (tmp_path / f"{task}-quick.png").exists()


def test_a_study_and_the_page_are_made_from_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(QUICK["bessel"], protocol=replace(QUICK["bessel"].protocol, epochs=2))
    lines = (((), ("resin", "resin->sin")), (("gamma=20",), ("resin->sin",)))
    monkeypatch.setitem(STUDIES, "bessel", Study(base, lines))
    run = CliRunner().invoke(reproduce, ["study", "bessel", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    study = read(tmp_path / "bessel-study.json")
    assert [line["changed"] for line in study["lines"]] == ["as settled", "gamma=20"]
    page = tmp_path / "page.md"
    page.write_text("<!-- begin bessel-study.study -->\n<!-- end bessel-study.study -->\n")
    where = ["--results", str(tmp_path), "--page", str(page)]
    assert CliRunner().invoke(reproduce, ["document", *where]).exit_code == 0
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
        (["table1", "mnist", "--set", "gamma=much"], "gamma=much: give a value of type float"),
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
    page = tmp_path / "docs"
    page.mkdir()
    (page / "paper.md").write_text("<!-- begin a.errors -->\n<!-- end a.errors -->\n")
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(reproduce, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_without_typer_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom transfer_surgery.cli import main\nmain()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'transfer-surgery[cli]'" in result.stderr


def test_each_task_has_whole_and_quick_settings_of_the_same_networks() -> None:
    assert EXPERIMENTS.keys() == QUICK.keys() == {"bessel", "mnist", "resnet20", "resnet110"}
    for name, experiment in EXPERIMENTS.items():
        assert experiment.rows == QUICK[name].rows
        assert len(experiment.rows) == (2 if name == "resnet110" else 10)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_a_study_changes_what_it_says(name: str) -> None:
    experiments = STUDIES[name].experiments()
    settled = experiments.pop("as settled").protocol.to_dict()
    for words, experiment in experiments.items():
        assert experiment.protocol.to_dict() != settled, words
