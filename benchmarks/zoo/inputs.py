"""Example inputs for the models of the zoos, as small as each model takes them.

What is checked (which activations run, bit equality, gradients) does not depend on the size of the
image, the time does. Sizes are tried in turn, the last is the size that the model is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor

from zoo.architectures import tiny_inputs
from zoo.diffusion import diffusion_inputs

_EXAMPLES = 2
_SIDES = (96, 128, 160, 192, 224)
_BY_KEYWORD = {"transformers": tiny_inputs, "diffusers": diffusion_inputs}


@dataclass(frozen=True)
class Setting:
    """One way to build a model and to call it.

    Attributes:
        text: describes the input in the results.
        arguments: makes the arguments for a dtype, positional or by keyword.
        options: what the model has to be built with to take them.
    """

    text: str
    arguments: Callable[[torch.dtype], tuple[Any, ...] | dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def settings(name: str) -> Iterator[Setting]:
    """The settings to try for a model, the cheapest first."""
    zoo, _, short = name.partition(":")
    if zoo == "timm":
        return _timm(short)
    if zoo in _BY_KEYWORD:
        return _keywords(_BY_KEYWORD[zoo](short))
    if zoo == "smp":
        return (_tensor((3, side, side)) for side in (64, 128, 224))
    for start, special in _SPECIAL.items():
        if short.startswith(start):
            return special()
    return (_tensor((3, side, side)) for side in (*_SIDES, 299))


def _timm(short: str) -> Iterator[Setting]:
    config = timm.get_pretrained_cfg(short)
    channels, *default = config.input_size if config else (3, 224, 224)
    least = config.min_input_size[-1] if config and config.min_input_size else 0
    first = max(least, 84 if "patch14" in short else _SIDES[0])
    for side in (first, *(side for side in _SIDES if side > first)):
        if side >= min(default):
            break
        options = {"img_size": side} if config and config.fixed_input_size else {}
        yield _tensor((channels, side, side), **options)
    yield _tensor((channels, *default))


def _keywords(inputs: dict[str, Any]) -> Iterator[Setting]:
    shapes = {name: x.shape for name, x in inputs.items() if isinstance(x, Tensor)}
    text = ", ".join(f"{name} {_text(tuple(shape))}" for name, shape in shapes.items())
    yield Setting(text, lambda dtype: inputs)


def _tensor(size: tuple[int, ...], **options: Any) -> Setting:
    shape = (_EXAMPLES, *size)
    return Setting(_text(shape), lambda dtype: (torch.randn(shape, dtype=dtype),), options)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _detection() -> Iterator[Setting]:
    """Images of different sizes in a list, with the targets that training needs."""

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        images = [torch.rand(3, 96, 128, dtype=dtype), torch.rand(3, 128, 96, dtype=dtype)]
        return images, [_target(image) for image in images]

    sizes = {"min_size": 96, "max_size": 128}
    yield Setting("list of 2 images, 128 px", arguments, sizes)
    yield Setting("list of 2 images, 128 px", arguments)


def _target(image: Tensor) -> dict[str, Tensor]:
    """Two objects: boxes, labels, masks for Mask R-CNN and keypoints for Keypoint R-CNN."""
    height, width = image.shape[-2:]
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [20.0, 30.0, 90.0, 90.0]], dtype=image.dtype)
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[:, 30:60, 20:60] = 1
    keypoints = torch.tensor([30.0, 40.0, 1.0], dtype=image.dtype).repeat(2, 17, 1)
    labels = torch.ones(2, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}


def _flow() -> Iterator[Setting]:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.randn(2, 3, 128, 128, dtype=dtype), torch.randn(2, 3, 128, 128, dtype=dtype)

    yield Setting("2 x 2x3x128x128", arguments)


def _video() -> Iterator[Setting]:
    yield _tensor((3, 8, 64, 64))
    yield _tensor((3, 16, 224, 224))


def _mvit() -> Iterator[Setting]:
    yield _tensor((3, 8, 64, 64), spatial_size=(64, 64), temporal_size=8)
    yield _tensor((3, 16, 224, 224))


def _s3d() -> Iterator[Setting]:
    yield _tensor((3, 16, 224, 224))


def _vit() -> Iterator[Setting]:
    yield _tensor((3, 112, 112), image_size=112)
    yield _tensor((3, 128, 128), image_size=128)


_SPECIAL: dict[str, Callable[[], Iterator[Setting]]] = {
    **dict.fromkeys(("fasterrcnn", "maskrcnn", "keypointrcnn"), _detection),
    **dict.fromkeys(("retinanet", "fcos", "ssd"), _detection),
    "raft": _flow,
    "mvit": _mvit,
    "vit_": _vit,
    "s3d": _s3d,
    **dict.fromkeys(("r3d", "mc3", "r2plus1d", "swin3d"), _video),
}
