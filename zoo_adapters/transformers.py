"""transformers: images and tokens of the sizes that a model's ``config`` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from transfer_surgery.sites import Adapter
from zoo_adapters.base import block_stages, id_batch, is_from, zero_batch
from zoo_adapters.transformers_config import follow_activations


class TransformersAdapter(Adapter):
    """Adapter for models of Hugging Face transformers that take images or tokens.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
        >>> model, adapter = ViTForImageClassification(config), TransformersAdapter()
        >>> {name: tuple(x.shape) for name, x in adapter.example_input(model).items()}
        {'pixel_values': (2, 3, 224, 224)}
        >>> list(adapter.stages(model))
        ['vit.layers.0', 'vit.layers.1']
    """

    def matches(self, model: nn.Module) -> bool:
        return is_from(model, "transformers")

    def example_input(self, model: nn.Module) -> dict[str, Tensor] | None:
        """By keyword, as the models are called; None for those with other inputs (audio, say)."""
        config = getattr(model, "config", None)
        kind = getattr(model, "main_input_name", None)
        if kind == "pixel_values":
            size = getattr(config, "image_size", 224)
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(config, "num_channels", 3)
            return {"pixel_values": zero_batch(model, (channels, height, width))}
        if kind == "input_ids":
            tokens = _tokens(model, config)
            names = ("input_ids", "decoder_input_ids")
            return dict.fromkeys(names[: 1 + getattr(config, "is_encoder_decoder", False)], tokens)
        return None

    def stages(self, model: nn.Module) -> Mapping[str, Iterable[str]]:
        """The layers or stages of each encoder: items of the outermost module lists."""
        lists: list[str] = []
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and not path.startswith(tuple(lists)):
                lists.append(f"{path}.")
        return block_stages(model, [path[:-1] for path in lists])

    def describe(self, model: nn.Module) -> bool:
        """Its ``config`` follows the activations, which ``from_pretrained`` builds from it."""
        if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
            return False
        follow_activations(model)
        return True


def _tokens(model: nn.Module, config: Any) -> Tensor:
    """A few tokens that are no padding, about which the models would warn."""
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    return id_batch(model, length, token=int(getattr(config, "pad_token_id", None) == 0))
