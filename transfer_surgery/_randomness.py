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


def random_streams(of_torch: bool = True) -> list[Stream]:
    """The streams of Python, numpy and torch that are in use."""
    streams: list[Stream] = [(random.getstate, random.setstate)]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        streams.append((numpy.get_state, numpy.set_state))
    if of_torch:
        streams.append((torch.get_rng_state, torch.set_rng_state))
    if of_torch and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        streams.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return streams


class RandomnessKept:
    """A context in which random numbers may be drawn; afterwards all streams are as before it.

    Numbers that another thread draws meanwhile come again: keep it short, or leave torch out.

    Args:
        of_torch: False where torch draws nothing, as on fake tensors.

    Examples:
        >>> expected = torch.manual_seed(0).get_state()
        >>> with RandomnessKept():
        ...     _ = torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), expected)
        True
    """

    def __init__(self, of_torch: bool = True) -> None:
        self._of_torch = of_torch

    def __enter__(self) -> RandomnessKept:
        self._streams = random_streams(self._of_torch)
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
