"""Many trainings side by side, each in a process of its own, each result in a file of its own.

What is finished is not done again, and what was interrupted goes on from its checkpoint: the same
command continues a table.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import Machine
from networks import find_row
from protocol import Protocol
from tasks import make_task
from trainer import Training


@dataclass(frozen=True)
class Job:
    """One training of one network.

    Args:
        task: one of `tasks.TASKS`.
        row: name of the network.
        seed: of everything random.
        protocol: how it is trained.
        machine: where it is trained.
        folder: of the result and the checkpoint.
        limit: use only so many images of each part.
        until: the `time.time` at which it is to stop with a checkpoint, after a whole epoch.
    """

    task: str
    row: str
    seed: int
    protocol: Protocol
    machine: Machine
    folder: Path
    limit: int | None = None
    until: float | None = None

    @property
    def file(self) -> Path:
        """Where the result is written."""
        return self.folder / f"{find_row(self.row).slug}-{self.seed}.json"

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished training is kept; other settings have another file."""
        text = json.dumps(self._settings(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return self.file.with_name(f"{self.file.stem}-{digest}.pt")

    def finished(self) -> dict[str, Any] | None:
        """The result, if it is there already.

        Raises:
            ValueError: it is there, but of other settings.
        """
        if not self.file.exists():
            return None
        result: dict[str, Any] = json.loads(self.file.read_text())
        if result["settings"] != self._settings():
            raise ValueError(
                f"{self.file} was made with other settings. Choose another --name, or remove it."
            )
        return result

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a result to be the same, but for the machine's rounding."""
        return {"task": self.task, "limit": self.limit} | self.protocol.to_dict()

    def run(self) -> dict[str, Any] | None:
        """Train, from the checkpoint where there is one, and write the result.

        Returns:
            The result; None: the time was up before the end. Then a checkpoint is there, unless
            the time was up before the start.
        """
        if self.until is not None and time.time() >= self.until:
            return None
        device = self.machine.prepare()
        task = make_task(self.task, device, self.limit)
        row = find_row(self.row)
        training = Training(row, task, self.protocol, self.machine, self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.file.with_suffix(".log")
        if not training.run(
            self.checkpoint, lambda now: log.write_text(_progress(now)), self.until
        ):
            return None
        result = training.result() | {
            "seed": self.seed,
            "settings": self._settings(),
            "machine": asdict(self.machine) | {"name": self.machine.name},
            "torch": str(torch.__version__),
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(result, allow_nan=False))
        os.replace(part, self.file)
        self.checkpoint.unlink(missing_ok=True)  # not before the result is there
        log.unlink(missing_ok=True)
        return result


def run_jobs(
    jobs: Sequence[Job], workers: int, minutes: float | None = None
) -> Iterator[dict[str, Any]]:
    """Run trainings side by side and yield their results as they end, finished ones first.

    Args:
        jobs: what to train; the first ones start first.
        workers: processes at a time.
        minutes: after so long no training or epoch is begun; those under way are kept in
            checkpoints, have no result yet, and go on with the next call. Leave time for an epoch.

    Raises:
        ValueError: a result is there that was made with other settings. Nothing is run then.
    """
    until = None if minutes is None else time.time() + 60 * minutes
    found = [job.finished() for job in jobs]
    yield from (result for result in found if result is not None)
    missing = [
        replace(job, until=until) for job, result in zip(jobs, found, strict=True) if result is None
    ]
    if not missing:
        return
    # Forked processes could use neither CUDA nor torch's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job.run) for job in missing]
        try:
            for future in as_completed(futures):
                if (result := future.result()) is not None:
                    yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _progress(training: Training) -> str:
    scores = training.curve["score"]
    done = f"epoch {training.epoch} of {training.protocol.epochs}"
    last = f", score {scores[-1]:.4g}" if scores else ""
    return f"{done}{last}, {training.seconds:.0f} s of training\n"
