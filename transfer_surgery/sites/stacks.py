"""Which modules of a model run, in each of its threads."""

from __future__ import annotations

import threading
from collections import defaultdict

from transfer_surgery.sites.observation import Frame


class Stacks:
    """The running modules, thread by thread, the innermost last."""

    def __init__(self) -> None:
        self._stacks: dict[int, list[Frame]] = defaultdict(list)
        self._first = threading.get_ident()

    @property
    def here(self) -> list[Frame]:
        """The modules that run in this thread."""
        return self._stacks[threading.get_ident()]

    @property
    def callers(self) -> list[Frame]:
        """The modules around a call; around one that a thread begins with, those that wait."""
        return self.here or self._stacks[self._first]

    @property
    def is_new_thread(self) -> bool:
        """Whether this is a thread of the model's own in which no module runs yet, or any more."""
        return not self.here and threading.get_ident() != self._first
