"""The table of a module's children, which tells when the module's own code walks over it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from transfer_surgery.sites.frames import is_torch, is_users

NAMED_MODULES = nn.Module.named_modules.__code__
"""What lists the modules below one, and their parameters and buffers."""
CHANGES = {one.__code__ for one in (nn.Module.train, nn.Module.apply, nn.Module._apply)}
"""What changes all modules below one, units too."""


class Children(dict[str, Any]):
    """A dict that calls `note` whenever something reads more of it than one entry."""

    def __init__(self, held: dict[str, Any], note: Callable[[], None]) -> None:
        super().__init__(held)
        self._note = note

    def __iter__(self) -> Iterator[str]:
        self._note()
        return super().__iter__()

    def __len__(self) -> int:
        self._note()
        return super().__len__()

    def keys(self) -> Any:
        self._note()
        return super().keys()

    def values(self) -> Any:
        self._note()
        return super().values()

    def items(self) -> Any:
        self._note()
        return super().items()


def reading_code() -> CodeType | None:
    """The code that reads a table now: the user's, or what it has called of torch, if that tells.

    Others of torch's methods, such as ``children``, only pass the table on. None stands for code of
    the finder itself.
    """
    frame, found = sys._getframe(1), None
    while not is_torch(frame.f_code) and not is_users(frame.f_code.co_filename) and frame.f_back:
        frame = frame.f_back  # the table's own code
    while is_torch(frame.f_code) and frame.f_back:
        if frame.f_code in CHANGES or frame.f_code is NAMED_MODULES:
            found = found or frame.f_code
        frame = frame.f_back
    return (found or frame.f_code) if is_users(frame.f_code.co_filename) else None
