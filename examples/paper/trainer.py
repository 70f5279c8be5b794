"""One training of one network: the plain loop of section 4.2, which a kill does not lose."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import Machine
from networks import Row, initialise
from protocol import Protocol
from tasks import Task
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from transfer_surgery import report

SAVE_EVERY = 60.0  # seconds between checkpoints
RECORDS = 200  # moments of a training that are kept, at most

Curve = dict[str, list[float]]


class Training:
    """The training of one network, epoch by epoch.

    Args:
        row: which of the paper's networks.
        task: what it learns; on the machine's device.
        protocol: how.
        machine: where.
        seed: of weights, gates, noise and the order of the examples.
    """

    def __init__(
        self, row: Row, task: Task, protocol: Protocol, machine: Machine, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.row, self.task, self.protocol, self.machine = row, task, protocol, machine
        device = torch.device(machine.device)
        model = task.network(row.source)
        initialise(model, row.source, protocol)
        model.to(device, memory_format=torch.channels_last)
        self.model = row.convert(model, protocol, task.example)
        machine.widen_products(self.model)
        self.weights = [p for name, p in model.named_parameters() if "log_alpha" not in name]
        self.optimizer = SGD(
            model.parameters(),
            protocol.lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            nesterov=protocol.momentum > 0,
            fused=machine.is_cuda,
        )
        steps = task.steps(protocol.batch_size)
        row.wrap(self.optimizer, model, protocol, protocol.epochs * steps)
        self.scheduler = CosineAnnealingWarmRestarts(
            self.optimizer, (protocol.restart or protocol.epochs) * steps, protocol.restart_factor
        )
        self.loss = self._compiled(task.loss) if machine.compile else task.loss
        self.epoch, self.seconds = 0, 0.0
        self.diverged: int | None = None
        self.curve: Curve = {"epoch": [], "loss": [], "score": [], "lr": []}
        if row.gate:
            self.curve["mean_gate"] = []

    def _compiled(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        mode = "reduce-overhead" if self.machine.is_cuda else "default"
        compiled: Callable[..., Tensor] = torch.compile(loss, mode=mode)
        return compiled

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.epoch == self.protocol.epochs or self.diverged is not None

    def run(
        self,
        checkpoint: Path,
        told: Callable[[Training], object] = lambda _: None,
        until: float | None = None,
    ) -> bool:
        """Train to the end, from the checkpoint where there is one.

        Args:
            checkpoint: written about once a minute, and where the time is up before the end.
            told: called after each epoch.
            until: the `time.time` from which no further epoch is begun; one always is.

        Returns:
            Whether the end was reached. The checkpoint is left for the caller to remove.
        """
        if checkpoint.exists():
            self.load(checkpoint)
        saved = time.monotonic()
        # On a CPU the time of its cores counts, whatever else the machine does meanwhile.
        clock = time.monotonic if self.machine.is_cuda else time.process_time
        while not self.ended:
            started = clock()
            self._train_epoch()
            self.seconds += clock() - started
            told(self)
            is_late = until is not None and time.time() >= until
            if not self.ended and (is_late or time.monotonic() - saved > SAVE_EVERY):
                self.save(checkpoint)
                saved = time.monotonic()
            if is_late:
                break
        return self.ended

    def _train_epoch(self) -> None:
        self.model.train()
        lr = self.optimizer.param_groups[0]["lr"]
        total, number = torch.zeros((), device=self.machine.device), 0
        self.epoch += 1
        try:
            for inputs, targets in self.task.batches(self.protocol.batch_size):
                total += self._step(inputs, targets)
                number += 1
        except FloatingPointError:  # of wrap_optimizer, which looks before it updates
            self.diverged = self.epoch
            return
        loss = total.item() / number
        if not math.isfinite(loss):
            self.diverged = self.epoch
        elif self._is_recorded():
            self._record(loss, lr)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()  # before the forward: a CUDA graph overwrites old gradients
        with self.machine.autocast():
            loss = self.loss(self.model, inputs, targets)
        loss.backward()
        if self.protocol.clip:
            nn.utils.clip_grad_norm_(self.weights, self.protocol.clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def _is_recorded(self) -> bool:
        every = math.ceil(self.protocol.epochs / RECORDS)
        return self.epoch % every == 0 or self.epoch == self.protocol.epochs

    def _record(self, loss: float, lr: float) -> None:
        self.model.eval()
        with self.machine.autocast():
            score = self.task.score(self.model)
        if not math.isfinite(score):  # the last step of the epoch went too far
            self.diverged = self.epoch
            return
        now = {"epoch": self.epoch, "loss": loss, "score": score, "lr": lr}
        if self.row.gate:
            now["mean_gate"] = report(self.model).total.mean_gate
        for name, value in now.items():
            self.curve[name].append(_short(value))

    def result(self) -> dict[str, Any]:
        """What is kept of a training that has ended: plain numbers, about 5 kB.

        Of one that diverged there is no score, no state of the gates and nothing to draw.
        """
        self.model.eval()
        scores = self.curve["score"] if self.diverged is None else []
        drawn = self.task.drawn(self.model) if self.diverged is None else {}
        return {
            "row": self.row.name,
            "diverged": self.diverged,
            "conv": scores[-1] if scores else None,
            "best": min(scores) if scores else None,
            "seconds": round(self.seconds, 1),
            "curve": self.curve,
            "sites": self._sites(),
        } | drawn

    def _sites(self) -> list[dict[str, Any]]:
        if not self.row.gate or self.diverged is not None:
            return []
        return [
            {"path": row.path, "mean_gate": _short(row.mean_gate), "gates": row.gates}
            for row in report(self.model)
        ]

    def save(self, file: Path) -> None:
        """Write the state, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.machine.is_cuda else None,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        part = file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, file)

    def load(self, file: Path) -> None:
        """Continue where `save` was called: on a CPU bit for bit, on CUDA to its rounding."""
        state = torch.load(file, map_location=self.machine.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"].cpu())
        if self.machine.is_cuda and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
        self.epoch, self.seconds, self.curve = state["epoch"], state["seconds"], state["curve"]


def _short(value: float) -> float:
    """Five significant digits: the files are committed."""
    return float(f"{value:.5g}")
