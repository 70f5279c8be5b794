"""torchvision: what each kind of model takes, images, videos, targets, pairs of frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from transfer_surgery.sites import Adapter, Site
from zoo_adapters.base import block_stages, is_from, zero_batch

_CONTAINERS = (
    *("features", "layers", "blocks", "encoder.layers", "trunk_output"),
    *("backbone", "backbone.features", "backbone.body"),
)


class TorchvisionAdapter(Adapter):
    """Adapter for all models of ``torchvision.models``.

    Images have the size of the weights' transform, 224 without one. Detection models get targets,
    which they need in training and accept in eval mode.

    Examples:
        >>> import torchvision
        >>> adapter, model = TorchvisionAdapter(), torchvision.models.resnet18()
        >>> adapter.example_input(model).shape
        torch.Size([2, 3, 224, 224])
        >>> video = torchvision.models.video.r3d_18()
        >>> adapter.example_input(video).shape
        torch.Size([2, 3, 16, 112, 112])
    """

    def matches(self, model: nn.Module) -> bool:
        return is_from(model, "torchvision")

    def example_input(self, model: nn.Module) -> Any:
        kind = _defining_module(model).removeprefix("torchvision.models.").split(".")[0]
        if kind == "detection":
            return _detection_example(model)
        if kind == "optical_flow":  # two frames; smaller ones shrink to nothing in the pyramid
            return zero_batch(model, (3, 128, 128)), zero_batch(model, (3, 128, 128))
        size = getattr(model, "image_size", None) or _crop(model)
        return zero_batch(model, (3, 16, size, size) if kind == "video" else (3, size, size))

    def role(self, model: nn.Module, site: Site) -> str | None:
        """In detection, sigmoids make scores and a ReLU makes distances: results, not features."""
        if not site.caller_type.__module__.startswith("torchvision.models.detection"):
            return None
        results = site.source.name == "sigmoid" or site.caller_type.__name__ == "FCOSRegressionHead"
        return "output" if results else None

    def stages(self, model: nn.Module) -> Mapping[str, Iterable[str]]:
        """The children of ``features``, of an encoder and of a backbone, one stage each.

        Where these are single layers, as in VGG, the container itself is the stage.
        """
        modules = dict(model.named_modules())
        opened = [path for path in _CONTAINERS if path in modules and _has_blocks(modules[path])]
        stages = block_stages(model, opened)
        return {name: paths for name, paths in stages.items() if name not in opened}


def _defining_module(model: nn.Module) -> str:
    classes = (cls.__module__ for cls in type(model).__mro__)
    return next(name for name in classes if name.split(".")[0] == "torchvision")


def _crop(model: nn.Module) -> int:
    """Crop size of weights for a model defined in the same file, 224 where there are none."""
    from torchvision.models import get_model_builder, get_model_weights, list_models

    file = _defining_module(model)
    for name in list_models():
        if get_model_builder(name).__module__ == file:
            for weights in get_model_weights(name):
                crop = getattr(weights.transforms(), "crop_size", None)
                if crop:
                    return int(crop[0])
    return 224


def _detection_example(model: nn.Module) -> tuple[Any, ...]:
    """Two images in a list and a target for each, with all that any of the models asks for.

    Detection cannot run on fake tensors, as scores decide how many boxes there are. The images are
    low and wide because the models enlarge them until one side is long enough: a tenth of the work.
    """
    height, width = 16, 640
    images = zero_batch(model, (3, height, width))
    target = {
        "boxes": images.new_tensor([[20, 2, 120, 14], [60, 4, 200, 12]]),
        "labels": torch.ones(2, dtype=torch.int64, device=images.device),
        "masks": torch.ones(2, height, width, dtype=torch.uint8, device=images.device),
        "keypoints": images.new_full((2, 17, 3), 8),
    }
    return list(images), [target, target]


def _has_blocks(container: nn.Module) -> bool:
    """Whether any of its children is more than a layer or a gated activation with its gate."""
    return any(len(list(child.modules())) > 2 for child in container.children())
