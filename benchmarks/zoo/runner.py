"""One process per model, bounded in time and memory, two or more at a time.

Processes fork from a server that has imported torch and the zoos but has not run anything, so that
a model costs no imports and no state leaks from one to the next. The parent watches: it ends what
takes too long, and the largest when all together take too much memory. A model says how much it
will need before it is built, and waits until that is free.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from zoo.architectures import module_of

# Installed packages only: the server of Python 3.11 does not know this script's folder. typer and
# rich are there because each process imports the script that was started.
_PRELOADED = (
    *("torch", "timm", "torchvision", "transformers"),
    *("transfer_surgery", "typer", "rich.progress"),
)
_SLOW = {"smp": "segmentation_models_pytorch", "diffusers": "diffusers.models.modeling_utils"}
"""What the models of a zoo import."""
_POLL = 0.2
_GIB = 2**30


@dataclass(frozen=True)
class Bounds:
    """What a run may use.

    Attributes:
        jobs: models at the same time, one thread each.
        timeout: seconds per model.
        memory_gib: of all processes together, as resident memory.
    """

    jobs: int = 2
    timeout: float = 300.0
    memory_gib: float = 18.0


@dataclass
class _Job:
    process: BaseProcess
    connection: Connection
    record: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    needs_gib: float = 0.0
    waits: bool = False
    ended: bool = False
    peak: int = 0

    def resident(self) -> int:
        """Bytes of memory now; 0 where there is no /proc to tell, and so no bound."""
        try:
            with open(f"/proc/{self.process.pid}/statm") as statm:
                now = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0
        self.peak = max(self.peak, now)
        return now

    def end(self, error: str | None = None) -> None:
        """Wait for the end of the process, or bring it about for the reason given."""
        if error is not None:
            self.process.kill()
        self.process.join()
        if error is None and self.process.exitcode:
            error = f"RuntimeError: the process ended with exit code {self.process.exitcode}"
        if error is not None:
            self.record["error"] = error
        self.record.setdefault("peak_mib", self.peak // 2**20)
        self.process.close()
        self.connection.close()
        self.ended = True


def run(names: Iterable[str], bounds: Bounds) -> Iterator[dict[str, Any]]:
    """Check the models; yield each one's record when it is complete, whatever became of it."""
    context = multiprocessing.get_context("forkserver")
    names = list(names)
    zoo = [module_of(n.partition(":")[2]) for n in names if n.startswith("transformers:")]
    zoo += [_SLOW[n.partition(":")[0]] for n in names if n.partition(":")[0] in _SLOW]
    context.set_forkserver_preload([*_PRELOADED, *zoo])
    todo, running = iter(names), list[_Job]()
    try:
        while True:
            while len(running) < bounds.jobs and (name := next(todo, None)) is not None:
                running.append(_start(context, name))
            if not running:
                return
            _listen(running)
            _enforce(running, bounds)
            _admit(running, bounds)
            for job in [job for job in running if job.ended]:
                running.remove(job)
                yield job.record
    finally:
        for job in running:
            job.end("KeyboardInterrupt: the run was stopped")


def _start(context: Any, name: str) -> _Job:
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Job(process, ours, {"name": name})


def _child(name: str, connection: Connection) -> None:
    import torch

    from zoo.check import check

    silence = os.open(os.devnull, os.O_WRONLY)  # zoos print and warn, across the progress bar
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")  # that the library itself gives none is shown in tests/
    torch.set_num_threads(1)
    check(name, connection.send, connection.recv)
    connection.close()


def _listen(running: list[_Job]) -> None:
    """Take in what the models report; the end of a connection is the end of its process."""
    jobs = {job.connection: job for job in running}
    for connection in wait(jobs, timeout=_POLL):
        job = jobs[connection]
        try:
            fields = job.connection.recv()
        except (EOFError, OSError):
            job.end()
            continue
        if "needs_gib" in fields:
            job.needs_gib, job.waits = fields.pop("needs_gib"), True
        job.record |= fields


def _enforce(running: list[_Job], bounds: Bounds) -> None:
    resident = {id(job): job.resident() for job in running if not job.ended}
    if sum(resident.values()) > bounds.memory_gib * _GIB:
        largest = max((job for job in running if not job.ended), key=lambda j: resident[id(j)])
        used = resident[id(largest)] / _GIB
        largest.end(f"MemoryError: {used:.1f} GiB, where {bounds.memory_gib:g} GiB are for all")
    for job in running:
        late = time.monotonic() - job.started > bounds.timeout
        if late and not job.ended and not job.waits:
            job.end(f"TimeoutError: more than {bounds.timeout:g} s")


def _admit(running: list[_Job], bounds: Bounds) -> None:
    """Let those begin whose announced memory fits beside the others, and anyone who is alone."""
    for job in running:
        taken = sum(j.needs_gib for j in running if not j.waits and not j.ended)
        if job.waits and not job.ended and (not taken or taken + job.needs_gib < bounds.memory_gib):
            job.waits, job.started = False, time.monotonic()
            job.connection.send(True)
