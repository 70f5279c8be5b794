"""Images: scikit-learn's digits, CIFAR-10, or a folder in torchvision's layout."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader


class Loader(Protocol):
    """Batches of normalised images and their labels; a DataLoader is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Unlabelled:
    """A loader's images without their labels."""

    loader: Loader

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.loader:
            yield images


@dataclass(frozen=True)
class ImageData:
    """Training and test images."""

    train: Loader
    test: Loader
    classes: int


def load_images(
    name: str, *, batch_size: int, device: torch.device, size: int, config: dict[str, Any]
) -> ImageData:
    """The data set of this name, or the folder of this name with train/ and val/.

    Args:
        name: ``"digits"``, ``"cifar10"`` or a folder.
        batch_size: of training; a last, smaller batch is left out.
        device: where images that fit into memory are kept.
        size: side in pixels of digits and CIFAR-10 images as the model sees them.
        config: timm's data config of the model, used for folders.
    """
    if name == "digits":
        return load_digits(batch_size=batch_size, device=device, size=size)
    if name == "cifar10":
        return load_cifar10(batch_size=batch_size, device=device, size=size)
    return load_folder(Path(name), batch_size=batch_size, device=device, config=config)


def load_digits(*, batch_size: int, device: torch.device, size: int = 32) -> ImageData:
    """1,797 scanned digits, 8x8 grey, that come with scikit-learn: 1,198 to train, 599 to test."""
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'transfer-surgery[examples]'"
        ) from error

    digits = load()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8"))[:, None]
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=1 / 3, random_state=0, stratify=digits.target
    )
    preprocessing = Preprocessing(device, size, mean=(0.5,), std=(0.5,))
    return ImageData(
        MemoryLoader(images[train], labels[train], batch_size, preprocessing, training=True),
        MemoryLoader(images[test], labels[test], batch_size, preprocessing),
        classes=10,
    )


def load_cifar10(
    *, batch_size: int, device: torch.device, size: int = 32, limit: int | None = None
) -> ImageData:
    """CIFAR-10 from the folder $TRANSFER_SURGERY_DATA, or downloaded to .data by torchvision.

    Args:
        batch_size: of training.
        device: where the images are kept.
        size: side of the images in pixels.
        limit: use only so many of the training images.
    """
    (x_train, y_train), (x_test, y_test) = read_cifar10()
    preprocessing = Preprocessing(
        device, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop=True
    )
    return ImageData(
        MemoryLoader(x_train[:limit], y_train[:limit], batch_size, preprocessing, training=True),
        MemoryLoader(x_test, y_test, batch_size, preprocessing),
        classes=10,
    )


def read_cifar10() -> list[tuple[Tensor, Tensor]]:
    """Training and test part of CIFAR-10: images (N, 3, 32, 32), uint8, and labels.

    Raises:
        ImportError: torchvision is not installed and there is no $TRANSFER_SURGERY_DATA.
    """
    folder = os.environ.get("TRANSFER_SURGERY_DATA")
    if folder:
        import numpy as np

        with np.load(Path(folder) / "cifar10.npz") as file:
            parts = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    else:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise ImportError(
                "CIFAR-10 is read by torchvision: pip install 'transfer-surgery[timm]'"
            ) from error
        sets = [CIFAR10(".data", train=part, download=True) for part in (True, False)]
        parts = [(part.data, part.targets) for part in sets]
    return [(torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(y).long()) for x, y in parts]


def load_folder(
    folder: Path, *, batch_size: int, device: torch.device, config: dict[str, Any]
) -> ImageData:
    """A folder ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, with timm's transforms."""
    from timm.data.transforms_factory import create_transform
    from torchvision.datasets import ImageFolder

    train = ImageFolder(_part(folder, "train"), create_transform(**config, is_training=True))
    test = ImageFolder(_part(folder, "val"), create_transform(**config))
    options: dict[str, Any] = {
        "batch_size": min(batch_size, len(train)),
        "num_workers": min(8, os.cpu_count() or 1),
        "pin_memory": device.type == "cuda",
    }
    return ImageData(
        DataLoader(train, shuffle=True, drop_last=True, **options),
        # Those of training start anew for each epoch: a checkpoint has the state that seeds them.
        DataLoader(test, persistent_workers=True, **options),
        classes=len(train.classes),
    )


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise FileNotFoundError(
            f"{folder / name} is not a folder. Known data: digits, cifar10, or a folder with "
            "train/CLASS/IMAGE and val/CLASS/IMAGE."
        )
    return folder / name


@dataclass(frozen=True)
class Preprocessing:
    """How a `MemoryLoader` prepares its images for a model.

    Args:
        device: where they are kept, resized and normalised.
        size: side of a batch's images in pixels.
        mean: of each channel, of values between 0 and 1.
        std: standard deviation of each channel, on the same scale.
        crop: whether training images are shifted and mirrored at random.
    """

    device: torch.device
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool = False


class MemoryLoader:
    """Batches of uint8 images, of shape (N, C, H, W), that fit into memory.

    In training the order is new each time, and there is no smaller batch at the end.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        preprocessing: Preprocessing,
        training: bool = False,
    ) -> None:
        self.images, self.labels = images.to(preprocessing.device), labels.to(preprocessing.device)
        self.batch_size = min(batch_size, len(labels))
        self.preprocessing, self.training = preprocessing, training
        self.mean = torch.tensor(preprocessing.mean, device=preprocessing.device).view(-1, 1, 1)
        self.std = torch.tensor(preprocessing.std, device=preprocessing.device).view(-1, 1, 1)

    def __len__(self) -> int:
        batches = len(self.labels) / self.batch_size
        return math.floor(batches) if self.training else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        number = len(self.labels)
        order = torch.randperm(number) if self.training else torch.arange(number)
        for chosen in torch.split(order.to(self.images.device), self.batch_size)[: len(self)]:
            yield self._show(self.images[chosen]), self.labels[chosen]

    def _show(self, images: Tensor) -> Tensor:
        if self.training and self.preprocessing.crop:
            images = crop_and_flip(images)
        images = (images.float() / 255 - self.mean) / self.std
        if images.shape[-1] == self.preprocessing.size:
            return images
        return F.interpolate(images, size=self.preprocessing.size, mode="bilinear", antialias=True)


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
