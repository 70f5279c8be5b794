"""Where a warning that comes out of ``optimizer.step()`` belongs: to the line that called it."""

from __future__ import annotations

import sys


def user_level() -> int:
    """``stacklevel`` of the caller's ``warnings.warn``, outside of torch and of this package.

    Not a constant: schedulers, compilers and decorators put frames of theirs around a step. (From
    Python 3.12 on ``skip_file_prefixes`` does this.)
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in ("torch", "transfer_surgery"):
        level, frame = level + 1, frame.f_back
    return level


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
