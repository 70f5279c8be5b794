"""torchvision: the input size is that of the weights' transform, 224 without one."""

from __future__ import annotations

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
        """Crop size of weights for a model defined in the same file, 224 where there are none."""
        from torchvision.models import get_model_builder, get_model_weights, list_models

        files = {cls.__module__ for cls in type(model).__mro__}
        for name in list_models():
            if get_model_builder(name).__module__ in files:
                for weights in get_model_weights(name):
                    crop = getattr(weights.transforms(), "crop_size", [224])
                    return int(crop[0])
        return 224
