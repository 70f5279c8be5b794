"""The random streams of a process: what the library draws does not advance those of the user."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Stream = tuple[Callable[[], Any], Callable[[Any], object]]
"""How the state of a stream is read and written."""


def random_streams() -> list[Stream]:
    """The streams of torch, Python and numpy that are in use."""
    streams: list[Stream] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
    ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        streams.append((numpy.get_state, numpy.set_state))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        streams.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return streams


class RandomnessKept:
    """A context in which random numbers may be drawn; afterwards all streams are as before it.

    Examples:
        >>> expected = torch.manual_seed(0).get_state()
        >>> with RandomnessKept():
        ...     _ = torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), expected)
        True
    """

    def __enter__(self) -> RandomnessKept:
        self._streams = random_streams()
        self._before = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        self._write(self._before)

    def outside(self, values: Iterable[T]) -> Iterator[T]:
        """Values that the user draws meanwhile, from streams that stay advanced afterwards."""
        iterator = iter(values)
        while True:
            ours = self._read()
            self._write(self._before)
            try:
                value = next(iterator)
            except StopIteration:
                return
            finally:
                self._before = self._read()
                self._write(ours)
            yield value

    def _read(self) -> list[Any]:
        return [read() for read, _ in self._streams]

    def _write(self, states: Iterable[Any]) -> None:
        for (_, write), state in zip(self._streams, states, strict=True):
            write(state)
