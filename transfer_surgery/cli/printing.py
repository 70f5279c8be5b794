"""Only results go to stdout, whatever a model prints, so that other programs can read them."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TextIO

import typer

_P = ParamSpec("_P")
_results: ContextVar[TextIO] = ContextVar("results")


def redirect_descriptor() -> None:
    """Let stderr have what code in C prints, and what programs print that a model starts."""
    if sys.stdout is not None:
        results = os.dup(1)
        os.dup2(2, 1)
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = open(results, "w", encoding=encoding, errors=errors)  # noqa: SIM115


def with_results(command: Callable[_P, None]) -> Callable[_P, None]:
    """A command in which `show` prints to stdout, and `print` to stderr."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        _results.set(sys.stdout)
        # For good: threads and exit handlers of a model print when the command is over.
        sys.stdout = sys.stderr
        with warnings.catch_warnings():
            # The line of code that a warning belongs to is none of the user's.
            warnings.showwarning = lambda message, *_, **__: say(f"Note: {message}")
            command(*args, **kwargs)

    return run


def show(text: str) -> None:
    """Print a result."""
    typer.echo(text, file=_results.get())


def say(text: str) -> None:
    """Say what was done, on stderr."""
    typer.echo(text, err=True)
