"""The recipes of the study of matched targets: how a trained network becomes another one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from study import BATCH

EPOCH = 390  # steps of `BATCH` images


@dataclass(frozen=True)
class Recipe:
    """How a network becomes sinusoidal."""

    depth: int = 20
    start: str = "matched"
    weights: str = "none"
    images: int = 1024
    transfer: str = "hard"
    noise: str = "batch"
    order: str = "joint"
    lesson: str = "labels"
    steps: int = 0
    opt: str = "sgd"
    lr: float = 0.02
    seed: int = 0
    target: str = "sin"
    keep: float = 0.0
    batch: int = BATCH

    @property
    def epochs(self) -> float:
        return self.steps * self.batch / (EPOCH * BATCH)

    @property
    def name(self) -> str:
        """Of its file: what differs from the defaults."""
        default = Recipe()
        parts = [f"resnet{self.depth}", self.start]
        keys = ("weights", "transfer", "noise", "order", "lesson", "opt")
        parts += [getattr(self, k) for k in keys if getattr(self, k) != getattr(default, k)]
        if self.target != default.target:
            parts.insert(1, re.sub(r"\W+", "-", self.target).strip("-"))
        if self.keep:
            parts.append(f"keep{self.keep}")
        if self.images != default.images:
            parts.append(f"{self.images}images")
        if self.lr != default.lr:
            parts.append(f"lr{self.lr}")
        if self.batch != default.batch:
            parts.append(f"batch{self.batch}")
        return "-".join([*parts, f"{self.steps}steps", f"seed{self.seed}"])


def recipes(depth: int, epochs: int, seeds: int) -> Iterator[Recipe]:
    """{how it starts} x {how it is transferred}, and the network that keeps its ReLUs."""
    steps = epochs * EPOCH
    for seed in range(seeds):
        common: dict[str, Any] = {"depth": depth, "steps": steps, "seed": seed}
        yield Recipe(**common, start="relu")
        for start in ("plain", "matched", "refitted"):
            yield Recipe(**common, start=start)
        if not epochs:
            for start in ("matched", "refitted"):
                yield Recipe(**common, start=start, weights="gradient")
            continue
        for start in ("matched", "refitted"):
            yield Recipe(**common, start=start, lesson="both")
        yield Recipe(**common, start="matched", transfer="soft", lesson="both")
        for lesson in ("teacher", "both", "labels"):
            yield Recipe(**common, start="refitted", lesson=lesson, opt="adamw", lr=1e-3)
        yield Recipe(**common, start="relu", opt="adamw", lr=1e-3)
        for start in ("plain", "matched"):
            for transfer in ("line", "soft"):
                yield Recipe(**common, start=start, transfer=transfer)
        for noise in ("example", "none"):
            yield Recipe(**common, start="matched", transfer="soft", noise=noise)
        for order in ("front_to_back", "sensitivity"):
            yield Recipe(**common, start="matched", transfer="soft", order=order)


def best_recipes(depth: int, epochs: int, seeds: int) -> Iterator[Recipe]:
    """README's first example, distilled without labels, and the network that keeps its ReLUs.

    Of the ResNet-20's recipes it is the best one for up to three epochs; for six, labels with the
    original's answers are as good, within the error of the test set.
    """
    how: dict[str, Any] = {"start": "refitted"}
    if epochs:
        how |= {"lesson": "teacher", "opt": "adamw", "lr": 1e-3}
    for seed in range(seeds):
        common: dict[str, Any] = {"depth": depth, "steps": epochs * EPOCH, "seed": seed}
        yield Recipe(**common, start="relu")
        yield Recipe(**common, **how)


def swap_recipes(epochs: int) -> Iterator[Recipe]:
    """Other targets than sinusoids: snake, and polynomials with budgets of ReLUs."""
    how: dict[str, Any] = {"steps": epochs * EPOCH}
    starts = ("plain", "matched", "refitted")
    if epochs:
        how |= {"lesson": "both", "opt": "adamw", "lr": 1e-3}
        starts = ("plain", "refitted")
    yield Recipe(start="relu", **how)
    for start in starts:
        yield Recipe(start=start, target="snake", **how)
    if epochs:  # `distill` keeps polynomials within their range
        starts, how["lesson"] = ("refitted",), "teacher"
    for target, keeps in (("polynomial", (0.0, 0.05, 0.2, 0.5)), ("polynomial(degree=4)", (0.0,))):
        for keep in keeps:
            for start in starts:
                yield Recipe(start=start, target=target, keep=keep, **how)
