"""timm: the input size stands in the model's ``pretrained_cfg``."""

from __future__ import annotations

from torch import Tensor, nn

from zoo_adapters.base import image_batch, is_from

__all__ = ["TimmAdapter"]


class TimmAdapter:
    """Adapter for models made by ``timm.create_model``.

    Example:
        >>> import timm
        >>> TimmAdapter().example_input(timm.create_model("resnet18")).shape
        torch.Size([2, 3, 224, 224])
    """

    def matches(self, model: nn.Module) -> bool:
        return is_from(model, "timm") and bool(self._config(model).get("input_size"))

    def example_input(self, model: nn.Module) -> Tensor:
        size = self._config(model)["input_size"]
        chans = getattr(model, "in_chans", None)
        return image_batch(model, (chans or size[0], *self._grid(model, size)))

    def _config(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        return dict(config or {})

    def _grid(self, model: nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
        """``create_model(img_size=...)`` sizes the patch embedding; it wins over the config."""
        embedding = getattr(model, "patch_embed", None)
        return tuple(getattr(embedding, "img_size", None) or size[1:])
