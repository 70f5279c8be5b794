"""The networks of the study of deployment, as they are trained on CIFAR-10.

Load one elsewhere: ``load_trained("efficientnet", folder)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from study import BATCH
from torch import nn
from yolo_backbone import YoloBackbone

from transfer_surgery.cli.finetuning.checkpoint import Checkpoint, state_of
from transfer_surgery.cli.finetuning.images import ImageData, MemoryLoader, load_cifar10
from transfer_surgery.cli.finetuning.training import Machine, train
from transfer_surgery.files import replace_file


@dataclass(frozen=True)
class Network:
    """One network.

    Args:
        source: the activation that is swapped.
        build: makes it with random weights, for ten classes.
    """

    source: str
    build: Callable[[], nn.Module]


def with_small_stride(name: str) -> nn.Module:
    """A network of timm whose first convolution keeps the size, as is usual for 32x32 images."""
    model = timm.create_model(name, num_classes=10)
    model.conv_stem.stride = (1, 1)
    return model


def convnext() -> nn.Module:
    # With layer scales that start at 1e-6 the blocks do little after so short a training.
    return timm.create_model(
        "test_convnext", num_classes=10, patch_size=2, act_layer="gelu", ls_init_value=1.0
    )


NETWORKS = {
    "mobilenetv3": Network("hardswish", lambda: with_small_stride("mobilenetv3_small_050")),
    "efficientnet": Network("silu", lambda: with_small_stride("test_efficientnet")),
    "convnext": Network("gelu", convnext),
    "yolo": Network("silu", YoloBackbone),
}


@dataclass(frozen=True)
class Data:
    """CIFAR-10 in three parts.

    Args:
        train: nine tenths of the training images, which networks are trained with.
        held_out: the others, by which settings are chosen.
        test: the test images.
    """

    train: MemoryLoader
    held_out: MemoryLoader
    test: MemoryLoader


def load_data(device: torch.device, limit: int | None = None) -> Data:
    """The images, or so many of the training images and of the test images."""
    data = load_cifar10(batch_size=BATCH, device=device, limit=limit)

    def part(loader: object, chosen: slice, training: bool = False) -> MemoryLoader:
        assert isinstance(loader, MemoryLoader)
        images, labels = loader.images[chosen], loader.labels[chosen]
        return MemoryLoader(images, labels, BATCH, loader.preprocessing, training)

    assert isinstance(data.train, MemoryLoader)
    number = len(data.train.labels) * 9 // 10
    return Data(
        part(data.train, slice(number), training=True),
        part(data.train, slice(number, None)),
        part(data.test, slice(limit)),
    )


def load_trained(name: str, folder: Path) -> nn.Module:
    """A network as `train_network` left it."""
    model = NETWORKS[name].build()
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True)["weights"])
    return model.eval()


def training_seconds(name: str, folder: Path) -> float:
    """How long its training took."""
    return float(torch.load(folder / f"{name}.pt", weights_only=True)["seconds"])


def train_network(
    name: str, folder: Path, data: Data, machine: Machine, epochs: int, lr: float, seed: int
) -> None:
    """Train it with the labels, and write NAME.pt; continue where an earlier training stopped."""
    file, clock = folder / f"{name}.pt", folder / f"{name}.seconds"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = machine.place(NETWORKS[name].build())
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    begun = time.process_time() - (float(clock.read_text()) if clock.exists() else 0.0)

    def note_time() -> None:
        replace_file(clock, lambda path: path.write_text(str(time.process_time() - begun)))

    settings = {"epochs": epochs, "lr": lr, "seed": seed, "images": len(data.train.labels)}
    checkpoint = Checkpoint(state_of(file), model, settings, note_time)
    images = ImageData(data.train, data.held_out, classes=10)
    train(model, images, optimizer, machine, epochs=epochs, title=name, checkpoint=checkpoint)
    done = {"weights": model.state_dict(), "seconds": float(clock.read_text())}
    replace_file(file, lambda path: torch.save(done, path))
