"""The settings that we settled on for each task, whole and quick; docs/paper.md says why."""

from __future__ import annotations

from dataclasses import dataclass

from transfer_surgery.reproduce.protocol import Protocol

__all__ = ["EXPERIMENTS", "Experiment"]


@dataclass(frozen=True)
class Experiment:
    """How a task is run.

    Args:
        protocol: of each training.
        seeds: trainings of each network.
        rows: networks; none: all ten.
        limit: training images to use; None: all.
    """

    protocol: Protocol
    seeds: int
    rows: tuple[str, ...] = ()
    limit: int | None = None


_MNIST = Protocol(epochs=20, gamma=50.0, noise="example")

EXPERIMENTS = {
    "mnist": Experiment(_MNIST, seeds=3),
}
