"""The models of the zoos by name, and how one is built: without weights, and quickly.

Random initialisation would take longer than everything else for models of a billion parameters,
so random fills become copies of random numbers drawn once while a model is built.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import timm
import torch
import torchvision
from torch import Tensor, nn

from zoo.architectures import architectures, build_tiny
from zoo.diffusion import build_diffusion, diffusion_models
from zoo.segmentation import build_segmentation, segmentation_models

_CHUNK = 2**20
_ALWAYS: dict[str, dict[str, Any]] = {
    # their own initialisation draws from scipy, minutes for one model
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    # untrained scores are low: without these, no detection is left whose value could be compared
    "fasterrcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 10},
    "maskrcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 10},
    "keypointrcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 10},
    "retinanet": {"score_thresh": 0.0, "detections_per_img": 10},
    "fcos": {"score_thresh": 0.0, "detections_per_img": 10},
    "ssd": {"score_thresh": 0.0, "detections_per_img": 10},
}
_PREFIXES = (
    *("timm.models.", "torchvision.models.", "transformers.models.", "diffusers.models."),
    *("segmentation_models_pytorch.decoders.", "segmentation_models_pytorch."),
)
_WITH_BACKBONE = ("torchvision.models.detection", "torchvision.models.segmentation")


ZOOS: dict[str, Callable[[], list[str]]] = {
    "timm": timm.list_models,
    "torchvision": torchvision.models.list_models,
    "transformers": architectures,
}
_PACKAGES = {"smp": "segmentation_models_pytorch", "diffusers": "diffusers"}
_LISTS = {"smp": segmentation_models, "diffusers": diffusion_models}
ZOOS |= {zoo: names for zoo, names in _LISTS.items() if importlib.util.find_spec(_PACKAGES[zoo])}
"""Those that are installed: what lists their models."""


def model_names(zoos: Iterable[str] = ZOOS) -> list[str]:
    """``"timm:NAME"`` and so on of every model that the zoos list."""
    return [f"{zoo}:{name}" for zoo in zoos for name in ZOOS[zoo]()]


def family_of(name: str) -> str:
    """Zoo and module that define a model, such as ``"timm:resnet"``; the zoo for unknown names."""
    zoo, _, short = name.partition(":")
    try:
        module = _entry_point(zoo, short).__module__
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return zoo
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return f"{zoo}:{module.partition('.model')[0]}"


def select(
    names: Iterable[str], globs: Iterable[str] = (), sample: int | None = None, seed: int = 0
) -> list[str]:
    """The names that match a glob, shuffled so that giants are spread; the first ``sample``."""
    globs = list(globs)
    chosen = sorted(n for n in names if not globs or any(fnmatchcase(n, g) for g in globs))
    random.Random(seed).shuffle(chosen)
    return chosen[:sample]


def build(name: str, options: Mapping[str, Any] = {}) -> nn.Module:
    """The model with random weights, in the default dtype, ready for evaluation."""
    zoo, _, short = name.partition(":")
    if zoo in _BUILDERS:
        return _BUILDERS[zoo](short)
    with cheap_random_fills():
        if zoo == "timm":
            return timm.create_model(short, **options).eval()
        options = _torchvision_options(short) | options
        if short.startswith("mvit"):
            return _mvit(short, options).eval()
        return torchvision.models.get_model(short, **options).eval()


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "transformers": build_tiny,
    "smp": build_segmentation,
    "diffusers": build_diffusion,
}
"""Of the zoos whose models take no options."""


def count_parameters(name: str) -> int:
    """Number of parameters, without allocating any where that is possible."""
    try:
        with torch.device("meta"):
            model = build(name)
    except (NotImplementedError, RuntimeError):  # computes with tensors when it is built
        model = build(name)
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def cheap_random_fills() -> Iterator[None]:
    """Make ``uniform_`` and ``normal_`` copy random numbers made before, at memory's speed."""
    generator = torch.Generator().manual_seed(0)
    size = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    uniform, normal = torch.rand(2 * _CHUNK, **size), torch.randn(2 * _CHUNK, **size)
    offsets = random.Random(0)

    @torch.no_grad()
    def fill(tensor: Tensor, numbers: Tensor, shift: float, scale: float) -> Tensor:
        if tensor.is_meta:
            return tensor
        flat = tensor.flatten()  # the tensor's own memory where that is contiguous
        for chunk in flat.split(_CHUNK):
            start = offsets.randrange(_CHUNK)
            chunk.copy_(numbers[start : start + len(chunk)]).mul_(scale).add_(shift)
        return tensor if tensor.is_contiguous() else tensor.copy_(flat.view(tensor.shape))

    replacements: dict[str, Callable[..., Tensor]] = {
        "uniform_": lambda t, a=0.0, b=1.0, generator=None: fill(t, uniform, a, b - a),
        "normal_": lambda t, mean=0.0, std=1.0, generator=None: fill(t, normal, mean, std),
        "erfinv_": lambda t: t,  # as good for us: uniform where timm wants a truncated normal
    }
    with mock.patch.multiple(Tensor, **replacements):
        yield


def package_of(zoo: str) -> Any:
    """The package of a zoo, imported."""
    return importlib.import_module(_PACKAGES.get(zoo, zoo))


def _entry_point(zoo: str, short: str) -> Any:
    if zoo == "timm":
        return timm.model_entrypoint(short)
    if zoo in ("transformers", "smp", "diffusers"):
        return getattr(package_of(zoo), short.partition("/")[0])
    return torchvision.models.get_model_builder(short)


def _mvit(short: str, options: Mapping[str, Any]) -> nn.Module:
    """MViT with ``spatial_size`` and ``temporal_size``, which torchvision's builders fix."""
    sizes = {key: options[key] for key in ("spatial_size", "temporal_size") if key in options}
    others = {key: value for key, value in options.items() if key not in sizes}
    module = sys.modules[_entry_point("torchvision", short).__module__]
    original = module.MViT
    with mock.patch.object(module, "MViT", lambda **given: original(**given | sizes)):
        return torchvision.models.get_model(short, **others)


def _torchvision_options(short: str) -> dict[str, Any]:
    """No weights of any kind, which would be downloaded; quantized models as trainable floats."""
    options: dict[str, Any] = {"weights": None}
    if _entry_point("torchvision", short).__module__.startswith(_WITH_BACKBONE):
        options["weights_backbone"] = None
    if short.startswith("quantized_"):
        options["quantize"] = False
    for start, special in _ALWAYS.items():
        if short.removeprefix("quantized_").startswith(start):
            options |= special
    return options
