"""What is learned: the data of section 4, the network for it, its loss and its score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery.reproduce.images import Images, load_cifar10, load_mnist
from transfer_surgery.reproduce.networks import LeNet5, ResNet, perceptron

__all__ = ["TASKS", "Bessel", "Classification", "Task", "make_task"]

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """A data set on a device and the network that learns it."""

    name: str
    example: Tensor
    """Two inputs, as the network sees them."""

    def network(self, activation: str) -> nn.Module:
        """A new network with this activation everywhere."""
        ...

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of an epoch."""
        ...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """One epoch of training batches, in a new random order."""
        ...

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The empirical risk of a batch, a mean over its examples."""
        ...

    def score(self, model: nn.Module) -> float:
        """What the tables show; less is better. The model is in eval mode."""
        ...

    def drawn(self, model: nn.Module) -> dict[str, Any]:
        """What a picture of this task needs of a trained model."""
        ...


class Bessel:
    """J0 on [-80, 80] from 200 noisy samples, section 4.3; the score is the error without noise.

    An epoch has two batches of 128, the second one short.

    Args:
        device: where it is computed.
        noise: standard deviation of the noise of the training labels.
        seed: of the division into halves and of the noise; the same for all networks.
    """

    name = "bessel"
    end = 80.0

    def __init__(self, device: torch.device, noise: float = 0.08, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.linspace(-self.end, self.end, 400, dtype=torch.float64)
        y = torch.special.bessel_j0(x)
        order = torch.randperm(400, generator=generator)
        train, test = order[:200].sort().values, order[200:].sort().values
        labels = y[train] + noise * torch.randn(200, generator=generator, dtype=torch.float64)
        self.x_train, self.y_train = _column(x[train], device), _column(labels, device)
        self.x_test, self.y_test = _column(x[test], device), _column(y[test], device)
        self.example = self.x_train[:2]

    def network(self, activation: str) -> nn.Module:
        return perceptron(activation)

    def steps(self, batch_size: int) -> int:
        return math.ceil(len(self.x_train) / batch_size)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        order = torch.randperm(len(self.x_train), device=self.x_train.device)
        for chosen in torch.split(order, batch_size):
            yield self.x_train[chosen], self.y_train[chosen]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(model(inputs).float(), targets)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        return F.mse_loss(model(self.x_test).float(), self.y_test).item()

    @torch.no_grad()
    def drawn(self, model: nn.Module) -> dict[str, Any]:
        grid = torch.linspace(-self.end, self.end, 401, dtype=torch.float64)
        fit = model(_column(grid, self.x_train.device)).float().flatten().cpu()
        return {"fit": [round(value, 4) for value in fit.tolist()]}


class Classification:
    """Images of ten classes; the score is the top-1 error in percent.

    Args:
        name: of the task.
        images: the data, on the device where the network runs.
        build: makes the network for an activation.
    """

    def __init__(self, name: str, images: Images, build: Callable[[str], nn.Module]) -> None:
        self.name, self.images, self._build = name, images, build
        self.example = images.seen(images.x_test[:2])

    def network(self, activation: str) -> nn.Module:
        return self._build(activation)

    def steps(self, batch_size: int) -> int:
        return max(len(self.images.x_train) // batch_size, 1)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        images, labels = self.images.shuffled()
        parts = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        for _, batch in zip(range(self.steps(batch_size)), parts, strict=False):
            yield batch

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(self.images.seen(inputs)).float(), targets)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        images, labels = self.images.x_test, self.images.y_test
        wrong = torch.zeros((), dtype=torch.long, device=labels.device)
        for x, y in zip(torch.split(images, 1000), torch.split(labels, 1000), strict=True):
            wrong += (model(self.images.seen(x)).argmax(1) != y).sum()
        return 100 * wrong.item() / len(labels)

    def drawn(self, model: nn.Module) -> dict[str, Any]:
        return {}


TASKS = ("bessel", "mnist", "resnet20", "resnet110")


def make_task(name: str, device: torch.device, limit: int | None = None) -> Task:
    """A task of section 4, its data loaded to a device.

    Args:
        name: one of `TASKS`; the last two learn CIFAR-10.
        device: where it is computed.
        limit: use only so many images of each part.

    Raises:
        ValueError: unknown name.
    """
    if name == "bessel":
        return Bessel(device)
    if name == "mnist":
        return Classification(name, load_mnist(device, limit), LeNet5)
    if name in TASKS:
        depth = int(name.removeprefix("resnet"))
        images = load_cifar10(device, limit)
        return Classification(name, images, lambda activation: ResNet(activation, depth))
    raise ValueError(f"unknown task {name!r}. Known: {', '.join(TASKS)}.")


def _column(values: Tensor, device: torch.device) -> Tensor:
    return values.float().view(-1, 1).to(device)
