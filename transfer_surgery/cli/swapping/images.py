"""Images as a model takes them, read from the disk whenever they are gone through."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.cli.finetuning.images import crop_and_flip

_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """How tensors are made of images, as in timm's validation.

    Args:
        size: of the model's input: ``(channels, height, width)``.
        config: timm's data config.
        transform: makes a tensor of an image of PIL.
    """

    size: tuple[int, ...]
    config: Mapping[str, Any]
    transform: Callable[[Any], Tensor]

    @classmethod
    def choose(
        cls,
        model: nn.Module,
        size: tuple[int, ...],
        settings: Mapping[str, Any],
        images: Sequence[Path],
    ) -> Preprocessing:
        """The model's own, with the user's settings.

        Args:
            model: whose ``pretrained_cfg`` is asked.
            size: of its input.
            settings: ``mean``, ``std``, ``crop_pct`` and ``interpolation``; None: the model's own.
            images: of which the headers are read. If all of them have the size of the input, they
                stay as they are, unless `settings` say how to crop.

        Raises:
            ImportError: timm is not installed.
            ValueError: an image cannot be read, the model takes no images, or the numbers of
                `settings` do not suit its channels.
        """
        try:
            timm: Any = import_module("timm.data")
        except ImportError as error:
            raise ImportError("swap needs timm: pip install 'transfer-surgery[timm]'") from error
        if len(size) != 3 or size[0] not in _MODES:
            raise ValueError(
                f"the model takes inputs of {'x'.join(map(str, size))}. This command reads images "
                "of 1 or 3 channels; swap_activations in Python takes any inputs."
            )
        sizes = set()
        for path in images:
            with _opened(path) as image:
                sizes.add(image.size)
        given = {name: value for name, value in settings.items() if value is not None}
        if sizes == {size[:0:-1]}:
            given.setdefault("crop_pct", 1.0)
        for name in ("mean", "std"):
            if name in given and len(given[name]) not in (1, size[0]):
                raise ValueError(
                    f"--{name} has {len(given[name])} numbers, and the model {size[0]} channels."
                )
        config = timm.resolve_data_config({"input_size": size} | given, model=model)
        if len(config["mean"]) != size[0] or len(config["std"]) != size[0]:
            raise ValueError(
                f"the model takes images of {size[0]} channel, and nothing says how they are "
                "normalised: give --mean and --std, such as --mean 0.5 --std 0.5."
            )
        return cls(size, config, timm.create_transform(**config))

    def __str__(self) -> str:
        c = self.config
        height, width = self.size[1:]
        cropped = "" if c["crop_pct"] == 1 else f", {c['crop_pct']:.3g} of each cropped"
        mean, std = (", ".join(f"{x:.3g}" for x in c[name]) for name in ("mean", "std"))
        return f"{height}x{width} pixels{cropped}; mean {mean}; standard deviation {std}"


@dataclass(frozen=True)
class Images:
    """Batches of images, without labels.

    Args:
        paths: where they are.
        preprocessing: what makes tensors of them.
        batch_size: of all batches but the last.
        training: whether they come in a new order each time, shifted and mirrored at random. Then
            there is no smaller batch at the end, whose statistics batch norms could not use, and
            an image that cannot be read is left out with a warning: much is computed by then.
    """

    paths: Sequence[Path]
    preprocessing: Preprocessing
    batch_size: int
    training: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        number = len(self.paths)
        order = torch.randperm(number) if self.training else torch.arange(number)
        if self.training and number > self.batch_size:
            order = order[: number // self.batch_size * self.batch_size]
        # PIL lets other threads run while it reads.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            read = self._read_or_tell if self.training else self._read
            for chosen in torch.split(order, self.batch_size):
                images = []
                for found in threads.map(read, chosen.tolist()):
                    if isinstance(found, Tensor):
                        images.append(found)
                    else:
                        warnings.warn(f"{found} The teaching goes on without it.", stacklevel=2)
                if images:
                    batch = torch.stack(images)
                    yield crop_and_flip(batch, batch.shape[-1] // 8) if self.training else batch

    def _read(self, number: int) -> Tensor:
        with _opened(self.paths[number]) as image:
            pixels = image.convert(_MODES[self.preprocessing.size[0]])
        return self.preprocessing.transform(pixels)

    def _read_or_tell(self, number: int) -> Tensor | ValueError:
        try:
            return self._read(number)
        except ValueError as error:
            return error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An image of PIL.

    Raises:
        ValueError: it cannot be read, or not to its end, or its pixels have more than 8 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # PIL would clip them at 255
                raise ValueError(f"its pixels have more than 8 bits (PIL's mode {image.mode})")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}. Take it away.") from error
