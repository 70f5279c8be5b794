"""The line of the user's code that a warning belongs to."""

from __future__ import annotations

import sys

_NOT_THE_USERS = ("torch", "transfer_surgery", "zoo_adapters")


def user_stacklevel() -> int:
    """The ``stacklevel`` of ``warnings.warn`` that points outside of torch and of this library.

    It is not a constant: schedulers, compilers and decorators add frames around a step. From Python
    3.12 on ``skip_file_prefixes`` does this.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    return level


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
