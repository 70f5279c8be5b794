"""The command as a user runs it, and the same in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from transfer_surgery.cli.app import app

COMMAND = Path(sys.executable).with_name("transfer-surgery")
PLAIN = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def shell(*arguments: object, folder: Path, fails: int = 0) -> tuple[str, str]:
    """What the command prints and says; it must end as expected, without a traceback."""
    result = subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | PLAIN,
        cwd=folder,
    )
    assert result.returncode == fails, result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    return result.stdout, result.stderr


def in_process(*arguments: object, fails: int = 0) -> Result:
    """The same in this process, where a warning is an error: what is printed, and how it ends."""
    result = CliRunner(env=PLAIN).invoke(app, list(map(str, arguments)))
    assert result.exit_code == fails, result.output or result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def invoke(*arguments: object, fails: int = 0) -> str:
    """Everything that is printed in this process, in one line."""
    return " ".join(in_process(*arguments, fails=fails).output.replace("│", " ").split())
