"""The networks that benchmarks/speed.py compares: original, converted, baked, and naive code."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar_resnet import ResNet

from transfer_surgery import (
    GatedActivation,
    PerChannel,
    bake,
    convert,
    fold_targets,
    recompute_activations,
    swap_targets,
)
from transfer_surgery.sites import swap_children
from transfer_surgery.units import gated_activations

PHASES = {"all gates 1": (20.0, 0.0), "mixed gates": (0.0, 1.0), "all gates 0": (-20.0, 0.0)}
"""Mean and standard deviation of `log_alpha`."""

UNITS_COMPILED = "gated, mixed gates, units compiled"
"""The variant whose units' arithmetic is compiled; that of all others is eager."""

Networks = Iterator[tuple[str, nn.Module, str]]
"""Title, network, title of its baseline."""


def new_model(name: str) -> nn.Module:
    """A timm model, or ``cifar_resnet20``, with random weights."""
    return ResNet(20) if name == "cifar_resnet20" else timm.create_model(name, num_classes=10)


def training_networks(model: nn.Module, images: Tensor, compiled: bool) -> Networks:
    """What is trained."""
    yield "original", copy.deepcopy(model), "original"
    if compiled:
        yield "original, compiled", torch.compile(copy.deepcopy(model)), "original, compiled"
    yield "plain sine", bake(_converted(model, images, "all gates 0")), "original"
    for phase in PHASES:
        baseline = "plain sine" if phase == "all gates 0" else "original"
        yield f"gated, {phase}", _converted(model, images, phase), baseline
        recomputing = recompute_activations(_converted(model, images, phase))
        yield f"gated, {phase}, recompute", recomputing, baseline
    mixed = _converted(model, images, "mixed gates")
    yield UNITS_COMPILED, copy.deepcopy(mixed), "original"
    if compiled:
        gated = torch.compile(copy.deepcopy(mixed))
        yield "gated, mixed gates, compiled", gated, "original, compiled"
    yield "naive code, mixed gates", _naive(mixed), "original"


def inference_networks(model: nn.Module, images: Tensor, compiled: bool) -> Networks:
    """What is deployed."""
    yield "original", copy.deepcopy(model), "original"
    for phase in PHASES:
        baked = bake(_converted(model, images, phase))
        if phase == "all gates 0":
            yield "plain sine", copy.deepcopy(baked), "original"
            yield f"baked, {phase}", baked, "plain sine"
        else:
            yield f"baked, {phase}", baked, "original"
    matched = _converted(model, images, "all gates 0")
    for _, unit in gated_activations(matched):
        for parameter in unit.add_fitted_target().parameters():
            parameter.data.normal_(1, 0.1)
    swap_targets(matched)
    yield "baked, matched targets", bake(copy.deepcopy(matched)), "plain sine"
    fold_targets(bake(matched), images[:2])
    yield "baked, matched and folded", matched, "plain sine"


def _converted(model: nn.Module, images: Tensor, phase: str) -> nn.Module:
    result = convert(copy.deepcopy(model), "sin", example_input=images[:2])
    mean, spread = PHASES[phase]
    for _, unit in gated_activations(result):
        unit.log_alpha.data.normal_(mean, spread) if spread else unit.log_alpha.data.fill_(mean)
    return result


def _naive(model: nn.Module) -> nn.Module:
    swap_children(model, {unit: NaiveGate(unit) for _, unit in gated_activations(model)})
    return model


class NaiveGate(nn.Module):
    """What one would write: both branches, and the gate of Eq. 15, in plain torch."""

    def __init__(self, unit: GatedActivation) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(unit.log_alpha.detach().clone())
        self.source = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[unit.source.name]
        self.target = Sine()
        assert isinstance(unit.granularity, PerChannel)
        self.axis = unit.granularity.axis

    def forward(self, x: Tensor) -> Tensor:
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        logits = (u.log() - (1 - u).log() + self.log_alpha) / (2 / 3)
        z = (logits.sigmoid() * 1.2 - 0.1).clamp(0, 1)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        z = z.view(shape)
        return z * self.source(x) + (1 - z) * self.target(x)


class Sine(nn.Module):
    """A sine as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)
