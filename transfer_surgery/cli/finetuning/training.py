"""The training loop: plain PyTorch, with a bar that shows how many gates are transferred."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from transfer_surgery.cli.finetuning.checkpoint import Checkpoint
from transfer_surgery.cli.finetuning.images import ImageData, Loader
from transfer_surgery.reports import History


@dataclass(frozen=True)
class Machine:
    """Where and how a model runs."""

    device: torch.device
    amp: bool = False
    compile: bool = False

    @classmethod
    def choose(cls, device: str = "auto", amp: bool = False, compile: bool = False) -> Machine:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(torch.device(device), amp, compile)

    def place(self, tensor_or_model: Any) -> Any:
        return tensor_or_model.to(self.device, memory_format=torch.channels_last, non_blocking=True)

    def autocast(self) -> AbstractContextManager[None]:
        # bfloat16 has the range of float32, so that no GradScaler is needed.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


@dataclass(frozen=True)
class Predictions:
    """A model's outputs for all test images, in order."""

    logits: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    def change_from(self, other: Predictions) -> float:
        """Largest absolute difference of any output; 0 where all are equal bit for bit."""
        if torch.equal(self.logits, other.logits):
            return 0.0
        return (self.logits - other.logits).abs().max().item()


@torch.inference_mode()
def predict(model: nn.Module, loader: Loader, machine: Machine) -> Predictions:
    """Outputs of the model in eval mode."""
    model.eval()
    logits, labels = [], []
    for images, targets in loader:
        with machine.autocast():
            logits.append(model(machine.place(images)).float())
        labels.append(targets.to(machine.device))
    return Predictions(torch.cat(logits), torch.cat(labels))


def some_images(data: ImageData, machine: Machine, number: int = 512) -> list[Tensor]:
    """Batches of about so many training images, without their labels."""
    batches, count = [], 0
    for images, _ in data.train:
        batches.append(machine.place(images))
        count += len(images)
        if count >= number:
            break
    return batches


def train(
    model: nn.Module,
    data: ImageData,
    optimizer: Optimizer,
    machine: Machine,
    *,
    epochs: int,
    title: str,
    history: History | None = None,
    checkpoint: Checkpoint | None = None,
) -> Predictions:
    """Train with cross entropy and one cycle of the learning rate.

    Args:
        model: the model, which is on its device already.
        data: images to train on, and to test with about eight times.
        optimizer: an optimizer whose learning rates are the highest of the cycle.
        machine: device, precision and compilation.
        epochs: how often to go through the training images, at least once.
        title: the name of the progress bar.
        history: the history of a converted model, which gets about 200 records, and at least one in
            each epoch.
        checkpoint: keeps the state after each epoch, so that a training that was killed can be
            continued.

    Returns:
        The outputs of the trained model for the test images.
    """
    steps = epochs * len(data.train)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=False)
    forward = torch.compile(model) if machine.compile else model
    every = min(math.ceil(steps / 200), len(data.train))  # steps between two records
    done = 0 if checkpoint is None else checkpoint.restore(optimizer, scheduler)
    started, step = time.perf_counter(), done * len(data.train)
    with _progress_bar() as progress:
        task = progress.add_task(title, total=steps, completed=step, now="")
        for epoch in range(done + 1, epochs + 1):
            model.train()
            for images, labels in data.train:
                loss = _train_step(forward, images, labels, optimizer, machine)
                lr = scheduler.get_last_lr()[0]
                scheduler.step()
                step += 1
                if step % every == 0 or step == steps:
                    now = _record(history, step, float(loss), float(lr))
                    progress.update(task, completed=step, now=now)
            if checkpoint is not None:
                checkpoint.save(epoch, optimizer, scheduler)
            if epoch % math.ceil(epochs / 8) == 0 or epoch == epochs:
                test = predict(model, data.test, machine)
                pace = (time.perf_counter() - started) / (epoch - done)
                line = f"  epoch {epoch:>3}: {now}, test accuracy {test.accuracy:.2%}"
                progress.console.print(f"{line}, {pace:.1f} s/epoch")
    return predict(model, data.test, machine) if done == epochs else test


def _train_step(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    optimizer: Optimizer,
    machine: Machine,
) -> Tensor:
    labels = labels.to(machine.device, non_blocking=True)
    with machine.autocast():
        loss = F.cross_entropy(forward(machine.place(images)), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _record(history: History | None, step: int, loss: float, lr: float) -> str:
    """Add to the history, and return the loss and the share of transferred gates as text."""
    if history is None:
        return f"loss {loss:.3f}"
    total = history.record(step, loss=loss, lr=lr).total
    return f"loss {loss:.3f}, {total.transferred:6.1%} transferred"


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(compact=True),
        console=get_console(),
    )
