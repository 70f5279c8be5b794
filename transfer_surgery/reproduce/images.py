"""MNIST and CIFAR-10, whole on the device as bytes: shuffled, augmented and normalised there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Images", "crop_and_flip", "load_cifar10", "load_mnist", "read_cifar10"]

DATA = "TRANSFER_SURGERY_DATA"


@dataclass(frozen=True)
class Images:
    """Images of shape (N, C, H, W), uint8, and labels of shape (N,), int64.

    Args:
        x_train: images to learn from.
        y_train: their labels.
        x_test: images to test with.
        y_test: their labels.
        mean: of each channel, of values between 0 and 1, taken off before the network sees them.
        std: likewise, divided by.
        augment: changes the training images of an epoch at random.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor
    std: Tensor
    augment: Callable[[Tensor], Tensor] | None = None

    def shuffled(self) -> tuple[Tensor, Tensor]:
        """All training images and labels in a new order, augmented."""
        order = torch.randperm(len(self.x_train), device=self.x_train.device)
        images = self.x_train[order]
        return (self.augment(images) if self.augment else images), self.y_train[order]

    def seen(self, images: Tensor) -> Tensor:
        """The images as the network sees them: float32, normalised, channels last."""
        normalised = (images.float() / 255 - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)


def load_mnist(device: torch.device, limit: int | None = None) -> Images:
    """MNIST with values between 0 and 1, from $TRANSFER_SURGERY_DATA or downloaded to ``.data``.

    Args:
        device: where the images are kept.
        limit: use only so many images of each part.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ImportError(_install("MNIST")) from error
    folder = os.environ.get(DATA)
    sets = [MNIST(folder or ".data", train=part, download=not folder) for part in (True, False)]
    parts = [(part.data[:, None], part.targets) for part in sets]
    return _images(parts, device, limit, mean=(0.0,), std=(1.0,))


def load_cifar10(device: torch.device, limit: int | None = None) -> Images:
    """CIFAR-10, shifted and mirrored in training, from the same places as `load_mnist`.

    Args:
        device: where the images are kept.
        limit: use only so many images of each part.

    Raises:
        ImportError: torchvision is not installed and there is no $TRANSFER_SURGERY_DATA.
    """
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return _images(read_cifar10(), device, limit, mean, std, augment=crop_and_flip)


def read_cifar10() -> list[tuple[Tensor, Tensor]]:
    """Training and test part of CIFAR-10: images (N, 3, 32, 32), uint8, and labels.

    Raises:
        ImportError: torchvision is not installed and there is no $TRANSFER_SURGERY_DATA.
    """
    folder = os.environ.get(DATA)
    if folder:
        import numpy as np

        with np.load(Path(folder) / "cifar10.npz") as file:
            parts = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    else:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise ImportError(_install("CIFAR-10")) from error
        sets = [CIFAR10(".data", train=part, download=True) for part in (True, False)]
        parts = [(part.data, part.targets) for part in sets]
    return [(torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(y).long()) for x, y in parts]


def _install(data: str) -> str:
    return f"{data} is read by torchvision: pip install 'transfer-surgery[timm]'"


def _images(
    parts: list[tuple[Tensor, Tensor]],
    device: torch.device,
    limit: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Callable[[Tensor], Tensor] | None = None,
) -> Images:
    parts = [(x[:limit].to(device), y[:limit].to(device)) for x, y in parts]
    (x_train, y_train), (x_test, y_test) = parts
    look = [torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std)]
    return Images(x_train, y_train, x_test, y_test, look[0], look[1], augment)


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """A random crop of each zero-padded image, every second one mirrored.

    Args:
        images: of shape (N, C, H, W), any dtype.
        padding: pixels of zeros at each side.

    Returns:
        Images of the same shape.
    """
    number, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, number), device=images.device)
    crops = windows[torch.arange(number, device=images.device), :, top, left]
    mirrored = torch.rand(number, 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, crops.flip(3), crops)
