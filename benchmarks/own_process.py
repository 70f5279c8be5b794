"""Measurements in processes of their own: seconds, and by how much the peak of memory rises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def in_a_process(program: str, *options: object, library: Path = HERE) -> dict[str, Any]:
    """Run a program, which prints its result as JSON, with the library that lies in a folder."""
    command = [sys.executable, program, *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(library)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return dict(json.loads(done.stdout))


def observed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, the seconds, and by how many MiB the process's peak rises. Linux only."""
    CLEAR.write_text("5")  # the peak starts anew, from what is resident now
    before, start = _peak_mib(), time.perf_counter()
    result = run()
    return result, time.perf_counter() - start, _peak_mib() - before


def _peak_mib() -> float:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
