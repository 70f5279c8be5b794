"""The line that shows how far a computation is."""

import builtins
import itertools

import pytest

from transfer_surgery.matching import progress
from transfer_surgery.matching.progress import Progress, progress_line


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes ten seconds."""
    ticks = itertools.count(step=10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_a_function_gets_every_step_with_the_remaining_time(clock):
    seen: list[Progress] = []
    with progress_line(seen.append, "distill", 4) as tell:
        for step in range(5):
            tell(step, f"step {step}")
    assert [p.done for p in seen] == [0, 1, 2, 3, 4]
    assert [p.seconds_left for p in seen] == [None, 60.0, 30.0, pytest.approx(40 / 3), 0.0]
    assert str(seen[1]) == "distill: 1 of 4 (25%), 1 min left. step 1"
    assert str(seen[0]) == "distill: 0 of 4 (0%). step 0"
    assert str(Progress("match", 1, 100, 9000.0, "")) == "match: 1 of 100 (1%), 2.5 h left."


def test_nothing_is_shown_where_it_is_not_wanted(clock, capsys):
    with progress_line(False, "distill", 2) as tell:
        tell(1)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def without_tqdm(monkeypatch):
    real = builtins.__import__

    def import_others(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_others)


def test_without_tqdm_plain_lines_come_now_and_then(clock, capsys, without_tqdm):
    with progress_line(True, "distill", 9) as tell:
        for step in range(1, 10):
            tell(step, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "distill: 3 of 9 (33%), 1 min left. loss 0.5"
    assert len(lines) == 3


def test_on_a_terminal_the_line_is_gone_at_the_end(clock, capsys, monkeypatch, without_tqdm):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with progress_line(True, "distill", 2) as tell:
        tell(1, "loss 0.5")
        tell(2, "loss 0.4")
    assert capsys.readouterr().err.split("\r\x1b[K") == [
        "",
        "distill: 1 of 2 (50%), 10 s left. loss 0.5",
        "distill: 2 of 2 (100%), 0 s left. loss 0.4",
        "",
    ]


def test_short_work_shows_nothing_where_tqdm_is_installed(clock, capsys):
    with progress_line(True, "distill", 9) as tell:
        for step in range(1, 10):  # plain lines would come, see above: tqdm has a clock of its own
            tell(step, "loss")
    assert capsys.readouterr() == ("", "")


def test_long_work_shows_a_bar_of_tqdm(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_LONG_PAUSE", 0.0)
    with progress_line(True, "distill", 2) as tell:
        tell(1, "loss 0.5")
    shown = capsys.readouterr().err
    assert "distill:  50%|" in shown
    assert "loss 0.5" in shown
