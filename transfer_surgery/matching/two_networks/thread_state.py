"""What of torch's and Python's state belongs to a thread, carried from one thread to others."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch

T = TypeVar("T")


class ThreadState:
    """The state of the thread that makes this object; `run` calls a function in that state.

    These are whether gradients are recorded, autocast, the modes that see each call (the default
    device is one of them), the CUDA stream, and context variables. A new thread has none of them.

    Examples:
        >>> import threading
        >>> with torch.no_grad():
        ...     state = ThreadState()
        >>> seen = []
        >>> call = lambda: seen.append(torch.is_grad_enabled())
        >>> thread = threading.Thread(target=lambda: state.run(call))
        >>> thread.start(), thread.join(), seen
        (None, None, [False])
    """

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._gradients = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._functions = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._dispatches = dispatch._get_current_dispatch_mode_stack()
        accelerator = torch.accelerator.current_accelerator()
        devices = {"cpu", *([] if accelerator is None else [accelerator.type])}
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in sorted(devices)
            if torch.is_autocast_enabled(device)
        ]
        self._stream = _cuda_stream()

    def run(self, call: Callable[[], T]) -> T:
        """Call a function in this state; also several threads at a time can do so."""
        return self._context.copy().run(self._run, call)

    def _run(self, call: Callable[[], T]) -> T:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            for device, dtype in self._autocast:
                # Without its cache: a weight that is replaced would be read as it was before.
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            # The modes as they are: entering one again would change what it remembers.
            for mode in self._functions:
                _push_mode(mode)  # type: ignore[no-untyped-call]
                stack.callback(_pop_mode)
            for mode in self._dispatches:
                dispatch._push_mode(mode)
                stack.callback(dispatch._pop_mode)
            return call()


def _cuda_stream() -> torch.cuda.Stream | None:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_stream() if in_use else None
