"""The loop of the examples: plain PyTorch, with a progress bar and a history of the gates."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from image_data import ImageData, Loader
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from summary import console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from transfer_surgery import History


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


def fit(
    model: nn.Module,
    data: ImageData,
    optimizer: Optimizer,
    machine: Machine,
    *,
    epochs: int,
    title: str,
    history: History | None = None,
) -> Predictions:
    """Train with cross entropy and one cycle of the learning rate.

    Args:
        model: on its device already.
        data: images to train on, and to test with now and then.
        optimizer: with its highest learning rate.
        machine: device, precision and compilation.
        epochs: passes over the training images, at least one.
        title: name of the progress bar.
        history: of a converted model; about 200 records are made.

    Returns:
        What the trained model says of the test images.
    """
    steps = epochs * len(data.train)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=False)
    forward = torch.compile(model) if machine.compile else model
    started, step = time.perf_counter(), 0
    with _progress_bar() as progress:
        task = progress.add_task(title, total=steps, now="")
        for epoch in range(1, epochs + 1):
            model.train()
            for images, labels in data.train:
                loss = _train_step(forward, images, labels, optimizer, machine)
                lr = scheduler.get_last_lr()[0]
                scheduler.step()
                step += 1
                if step % math.ceil(steps / 200) == 0 or step == steps:
                    now = _record(history, step, loss.item(), lr)
                    progress.update(task, completed=step, now=now)
            if epoch % math.ceil(epochs / 8) == 0 or epoch == epochs:
                test = predict(model, data.test, machine)
                pace = (time.perf_counter() - started) / epoch
                line = f"  epoch {epoch:>3}: {now}, test accuracy {test.accuracy:.2%}"
                progress.console.print(f"{line}, {pace:.1f} s/epoch")
    return test


def _train_step(
    forward: nn.Module, images: Tensor, labels: Tensor, optimizer: Optimizer, machine: Machine
) -> Tensor:
    labels = labels.to(machine.device, non_blocking=True)
    with machine.autocast():
        loss = F.cross_entropy(forward(machine.place(images)), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _record(history: History | None, step: int, loss: float, lr: float) -> str:
    """Add to the history, and say in a few words how things stand."""
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
        console=console,
    )
