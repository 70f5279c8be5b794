"""The table of a module's children, which tells when the module's own code walks over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


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
