"""A forward pass that can wait: it runs in a thread of its own, which is stopped and sent on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from transfer_surgery.matching.two_networks.thread_state import ThreadState


class WaitingForward:
    """A call that stops wherever its code calls `stop`, and goes on at the next `advance`.

    Only one side works at a time: either the thread of the call, or the one that advances it.

    Args:
        call: what is called; hooks in it call `stop`.
        state: the state of torch that the call gets.

    Examples:
        >>> def call():
        ...     forward.stop("half-way")
        >>> forward = WaitingForward(call, ThreadState())
        >>> forward.advance(), forward.advance()
        ('half-way', None)
    """

    def __init__(self, call: Callable[[], Any], state: ThreadState) -> None:
        self._call, self._state = call, state
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._seen: Any = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def advance(self) -> Any:
        """Let the call go on to its next stop; what it shows there, or None at its end.

        Raises:
            BaseException: what the call raises.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="match_targets", daemon=True)
            self._thread.start()
        elif self._thread.is_alive():
            self._go.release()
        else:
            return None
        try:
            self._there.acquire()
        except BaseException:  # Ctrl-C comes to the main thread: the call must not go on alone
            self.close()
            raise
        seen, self._seen = self._seen, None
        if self._error is not None:
            raise self._error
        if seen is None:
            self._thread.join()
        return seen

    def stop(self, seen: Any) -> None:
        """Called in the thread of the call: wait here, and show something that is not None."""
        self._check_closing()
        self._seen = seen
        del seen
        self._there.release()
        self._go.acquire()
        self._check_closing()

    def close(self) -> None:
        """End the call wherever it waits; its thread is gone afterwards."""
        self._closing = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()

    def _check_closing(self) -> None:
        if self._closing:
            raise _Closed

    def _run(self) -> None:
        try:
            self._state.run(self._call)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._there.release()


class _Closed(BaseException):
    """Ends a call that is not needed any more."""
