"""torchvision: the input size is that of the weights' transform, 224 without one."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from zoo_adapters.base import image_batch, is_from

__all__ = ["TorchvisionAdapter"]


class TorchvisionAdapter:
    """Adapter for torchvision's image models.

    Example:
        >>> import torchvision
        >>> TorchvisionAdapter().example_input(torchvision.models.resnet18()).shape
        torch.Size([2, 3, 224, 224])
    """

    def matches(self, model: nn.Module) -> bool:
        return is_from(model, "torchvision")

    def example_input(self, model: nn.Module) -> Tensor:
        size = getattr(model, "image_size", None) or self._crop(model)
        return image_batch(model, (3, size, size))

    def _crop(self, model: nn.Module) -> int:
        """Crop size of the first weights in the file that defines the model's class."""
        from torchvision.models import get_model_weights, list_models

        module = next(
            c.__module__ for c in type(model).__mro__ if c.__module__.startswith("torchvision")
        )
        for name in list_models(module=sys.modules[module]):
            for weights in get_model_weights(name):
                return int(weights.transforms().crop_size[0])
        return 224
