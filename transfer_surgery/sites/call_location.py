"""Where in a caller's code a call happens: the identity of a call site.

A call site is the chain of source positions from the caller's ``forward`` down to the call, and its
count among calls from that chain. The finder and the interceptor read the same chain, in either
training mode, so all of them mean the same site.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from types import CodeType, FrameType
from typing import NamedTuple

from torch import nn

from transfer_surgery.sites.frames import CHECKPOINT, MODULE_CALL, code_of, is_users

Location = tuple[tuple[str, int, int, int, int], ...]


class CallKey(NamedTuple):
    """One call site of a caller: where, and the how-manyth activation call from there."""

    location: Location
    number: int


class KeyCounter:
    """Numbers the activation calls of one call of a caller, location by location."""

    def __init__(self) -> None:
        self._seen: Counter[Location] = Counter()

    def key(self, location: Location) -> CallKey:
        self._seen[location] += 1
        return CallKey(location, self._seen[location] - 1)


def locate() -> list[tuple[Location, nn.Module]]:
    """The current call seen from each module on the stack, the innermost module first.

    Returns:
        Pairs of the location within a module's own code and that module.
    """
    found: list[tuple[Location, nn.Module]] = []
    chain: list[tuple[str, int, int, int, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is MODULE_CALL:
            found.append((tuple(chain), frame.f_locals["self"]))
            chain = []
        elif is_users(code.co_filename):
            chain.append(_position(code, frame.f_lasti))
        frame = frame.f_back
    return found


def is_checkpointed(caller: nn.Module) -> bool:
    """Whether the running call of ``caller`` is inside a ``torch.utils.checkpoint`` of its own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is MODULE_CALL and frame.f_locals["self"] is caller:
            return False
        if frame.f_code.co_filename == CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def is_in_forward(module: nn.Module) -> bool:
    """Whether the running call is in the forward of the innermost module, and in no hook of it."""
    frame, code = sys._getframe(1), code_of(module.forward)
    while frame.f_code is not MODULE_CALL and frame.f_code is not code and frame.f_back:
        frame = frame.f_back
    return frame.f_code is code


@functools.lru_cache(maxsize=4096)
def _position(code: CodeType, instruction: int) -> tuple[str, int, int, int, int]:
    """Name of a function, and where in it an expression starts and ends.

    Lines count from the function's own: the same on another machine and Python version.
    """
    positions = itertools.islice(code.co_positions(), instruction // 2, None)
    line, end_line, column, end_column = (number or 0 for number in next(positions))
    first = code.co_firstlineno
    return code.co_qualname, line - first, column, end_line - first, end_column
