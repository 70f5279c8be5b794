"""What is learned: the data of section 4, the network for it, its loss and its score."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from networks import LeNet5, ResNet, perceptron
from torch import Tensor, nn

from transfer_surgery.cli.finetuning.images import crop_and_flip, read_cifar10

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Images:
    """Images of shape (N, C, H, W), uint8, and labels of shape (N,), whole on the device.

    Args:
        train: images to learn from and their labels.
        test: images to test with and their labels.
        mean: of each channel, of values between 0 and 1, taken off before the network sees them.
        std: of each channel; what is left is divided by it.
        augment: changes the training images of an epoch at random.
    """

    train: Batch
    test: Batch
    mean: Tensor
    std: Tensor
    augment: Callable[[Tensor], Tensor] | None = None

    def shuffled(self) -> Batch:
        """All training images and labels in a new order, augmented."""
        images, labels = self.train
        order = torch.randperm(len(images), device=images.device)
        images = images[order]
        return (self.augment(images) if self.augment else images), labels[order]

    def seen(self, images: Tensor) -> Tensor:
        """The images as the network sees them: float32, normalised, channels last."""
        normalised = (images.float() / 255 - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)


def load_mnist(device: torch.device, limit: int | None = None) -> Images:
    """MNIST with values between 0 and 1, from $TRANSFER_SURGERY_DATA or downloaded to ``.data``.

    Args:
        device: where the images are kept.
        limit: use only so many images of each part.
    """
    from torchvision.datasets import MNIST

    folder = os.environ.get("TRANSFER_SURGERY_DATA")
    sets = [MNIST(folder or ".data", train=part, download=not folder) for part in (True, False)]
    parts = [(part.data[:, None], part.targets) for part in sets]
    return _images(parts, device, limit, mean=(0.0,), std=(1.0,))


def load_cifar10(device: torch.device, limit: int | None = None) -> Images:
    """CIFAR-10, shifted and mirrored in training, from the same places as `load_mnist`."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return _images(read_cifar10(), device, limit, mean, std, augment=crop_and_flip)


def _images(
    parts: list[Batch],
    device: torch.device,
    limit: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Callable[[Tensor], Tensor] | None = None,
) -> Images:
    train, test = [(x[:limit].to(device), y[:limit].to(device)) for x, y in parts]
    look = [torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std)]
    return Images(train, test, look[0], look[1], augment)


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
        self.example = images.seen(images.test[0][:2])

    def network(self, activation: str) -> nn.Module:
        return self._build(activation)

    def steps(self, batch_size: int) -> int:
        return max(len(self.images.train[0]) // batch_size, 1)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        images, labels = self.images.shuffled()
        parts = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        for _, batch in zip(range(self.steps(batch_size)), parts, strict=False):
            yield batch

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(self.images.seen(inputs)).float(), targets)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        images, labels = self.images.test
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
