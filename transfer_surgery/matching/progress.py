"""One line that shows how far a long computation is, and how long it takes yet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_DELAY = 2.0  # seconds before which nothing is shown: what is that short needs no line
_PAUSE = 0.2  # seconds between two lines on a terminal
_LONG_PAUSE = 30.0  # the same where each line stays, as in a log file


@dataclass(frozen=True)
class Progress:
    """How far a computation is.

    Args:
        task: what is computed, such as ``"distill"``.
        done: number of steps that are done.
        total: number of all steps.
        seconds_left: estimate of the remaining time; None before the first step is done.
        now: what is being done, such as the path of a site, or a number that shows the success.
    """

    task: str
    done: int
    total: int
    seconds_left: float | None
    now: str

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {_time(self.seconds_left)} left"
        share = self.done / self.total if self.total else 1.0
        return f"{self.task}: {self.done} of {self.total} ({share:.0%}){left}. {self.now}".rstrip()


Shown = bool | Callable[[Progress], None]
"""What ``progress=`` takes: whether to show a line, or a function that gets each `Progress`."""


@contextmanager
def progress_line(shown: Shown, task: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Gives a function that takes the number of steps done and what is done now.

    Args:
        shown: False: nothing is shown; True: a bar of tqdm where it is installed, else plain lines,
            both on the error stream and from the third second on; a function gets each `Progress`.
        task: what is computed.
        total: number of all steps.
    """
    started = time.monotonic()
    bar = _tqdm_bar(task, total) if shown is True else None
    last = started
    written = False

    def tell(done: int, now: str = "") -> None:
        nonlocal last, written
        moment = time.monotonic()
        if bar is not None:
            bar.set_postfix_str(now, refresh=False)
            bar.update(done - bar.n)
        elif shown:
            left = (moment - started) * (total - done) / done if done else None
            state = Progress(task, done, total, left, now)
            if callable(shown):
                shown(state)
            elif moment - last >= (_PAUSE if sys.stderr.isatty() else _LONG_PAUSE):
                if moment - started >= _DELAY:
                    _write(state)
                    written = True
                last = moment

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
        elif written and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")  # as tqdm does: what comes next begins the line
            sys.stderr.flush()


def _tqdm_bar(task: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    pause = _PAUSE if sys.stderr.isatty() else _LONG_PAUSE
    return tqdm(total=total, desc=task, delay=_DELAY, mininterval=pause, leave=False)


def _write(state: Progress) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{state}")
    else:
        sys.stderr.write(f"{state}\n")
    sys.stderr.flush()


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
