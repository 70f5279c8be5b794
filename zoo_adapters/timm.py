"""timm: input size in the model's ``pretrained_cfg``, stages in its ``group_matcher``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from transfer_surgery.sites import Adapter, Site
from zoo_adapters.base import is_from, zero_batch


class TimmAdapter(Adapter):
    """Adapter for models made by ``timm.create_model``.

    Two channel axes need a word. The sigmoid of efficient channel attention follows a convolution
    over channels, so that its channels are last. The first layer of a token-mixing MLP (mixer,
    gmixer) mixes along the last axis: a gate "per channel" is one per hidden unit, as in any MLP.

    Examples:
        >>> import timm
        >>> model = timm.create_model("resnet18")
        >>> TimmAdapter().example_input(model).shape
        torch.Size([2, 3, 224, 224])
        >>> list(TimmAdapter().stages(model))
        ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    """

    def matches(self, model: nn.Module) -> bool:
        return is_from(model, "timm")

    def example_input(self, model: nn.Module) -> Tensor | None:
        config = self._config(model)
        if "input_size" not in config:
            return None  # a class of timm called by itself, without create_model
        channels = getattr(model, "in_chans", None) or config["input_size"][0]
        return zero_batch(model, (channels, *self._grid(model, config)))

    def channel_axis(self, model: nn.Module, site: Site) -> int | None:
        from timm.layers.eca import CecaModule, EcaModule

        return -1 if issubclass(site.caller_type, (EcaModule, CecaModule)) else None

    def stages(self, model: nn.Module) -> Mapping[str, Iterable[str]]:
        """``stem``, then each numbered block of the coarse ``group_matcher``, under its own name.

        What stands before the first of them and has no group (an activation, say) is of the stem.
        """
        patterns = _patterns(model)
        names = {path: _match(patterns, path) for path, _ in model.named_modules() if path}
        paths = list(names)
        first = next((i for i, p in enumerate(paths) if not _is_stem(names[p] or "stem")), 0)
        for path in paths[:first]:
            if not paths[first].startswith(f"{path}."):
                names[path] = names[path] or "stem"
        stages: dict[str, list[str]] = {}
        for path, name in names.items():
            if name is not None and names.get(path.rpartition(".")[0]) != name:
                stages.setdefault(name, []).append(path)
        return stages

    def _config(self, model: nn.Module) -> dict[str, Any]:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        return dict(config or {})

    def _grid(self, model: nn.Module, config: dict[str, Any]) -> tuple[int, ...]:
        """``create_model(img_size=...)`` sizes the patch embedding; it wins over the config."""
        sized = getattr(getattr(model, "patch_embed", model), "img_size", None)
        return tuple(sized or config["input_size"][1:])


def _patterns(model: nn.Module) -> list[tuple[str | None, re.Pattern[str]]]:
    """Stages with a name, and those that go by what their pattern matches.

    Where there is no coarse ``group_matcher``, the modules of ``feature_info`` and their siblings.
    """
    try:
        matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (AttributeError, TypeError, AssertionError):  # none, or none that is coarse
        matcher = None
    if isinstance(matcher, dict):
        given = [
            (name if _is_stem(name) else None, re.compile(pattern))
            for name, patterns in matcher.items()
            for pattern in ([patterns] if isinstance(patterns, str) else [p for p, _ in patterns])
        ]
        return [(name, pattern) for name, pattern in given if name or pattern.groups]
    info = getattr(model, "feature_info", None)
    modules = [entry["module"] for entry in info] if isinstance(info, list) else []
    siblings = [re.sub(r"\d+$", r"\\d+", re.escape(module)) for module in modules]
    return [(None, re.compile(rf"{pattern}\.")) for pattern in siblings]


def _match(patterns: list[tuple[str | None, re.Pattern[str]]], path: str) -> str | None:
    """Name of the stage that a module path belongs to; patterns may expect a dot after it."""
    for name, pattern in patterns:
        if match := pattern.match(f"{path}."):
            return name or match.group().rstrip(".")
    return None


def _is_stem(stage: str) -> bool:
    return stage.startswith("stem")
