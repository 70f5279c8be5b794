"""What the studies of trained networks share: recipes, images, swaps, training, results."""

from __future__ import annotations

import copy
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from transfer_surgery import (
    MatchWarning,
    bake,
    convert,
    fold_targets,
    match_targets,
    swap_targets,
)
from transfer_surgery.cli.finetuning.images import MemoryLoader
from transfer_surgery.cli.finetuning.training import Machine, Predictions

BATCH = 128


def print_commands(recipes: Iterable[Any], folder: Path, options: Sequence[str]) -> None:
    """A shell command for each recipe that has no file yet.

    Args:
        recipes: dataclasses whose fields are the options of the command ``run``.
        folder: where a recipe's file is, by its name.
        options: other options, passed on.
    """
    for recipe in recipes:
        if not (folder / f"{recipe.name}.json").exists():
            # xargs takes one level of quotes away, and the shell the other.
            own = [f"--{k} {shlex.quote(shlex.quote(str(v)))}" for k, v in asdict(recipe).items()]
            done = f"--threads 1 --folder {folder} {' '.join(options)}".rstrip()
            print(f"{sys.executable} {sys.argv[0]} run {' '.join(own)} {done}")


def calibration(train: object, number: int, seed: int) -> list[Tensor]:
    """So many images of a `MemoryLoader` as they are, without crops, flips and labels."""
    assert isinstance(train, MemoryLoader)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[:number].to(train.images.device)
    plain = MemoryLoader(train.images[chosen], train.labels[chosen], BATCH, train.preprocessing)
    return [images for images, _ in plain]


def swapped(
    model: nn.Module,
    source: str,
    target: str,
    start: str,
    batches: list[Tensor],
    offset: bool = True,
    roles: tuple[str, ...] = ("hidden",),
    teach: Callable[[nn.Module], object] | None = None,
) -> tuple[nn.Module, int]:
    """A network with other activations, baked and folded.

    Args:
        model: a trained network; it is copied.
        source: what is swapped.
        target: what comes instead.
        start: ``original``, ``plain`` (swapped alone), ``matched`` or ``refitted``.
        batches: images without labels, to fit to.
        offset: whether the targets have one.
        roles: of the sites, as in `convert`.
        teach: trains the network before it is baked.

    Returns:
        The network, and how many of its sites have fitted numbers left.
    """
    model = copy.deepcopy(model)
    if start == "original":
        return model, 0
    convert(model, target, source=source, roles=roles, example_input=batches[0][:2])
    if start != "plain":
        with warnings.catch_warnings():  # a poor fit is what the study may show
            warnings.simplefilter("ignore", MatchWarning)
            match_targets(model, batches, refit=start == "refitted", offset=offset, progress=False)
    swap_targets(model)
    if teach is not None:
        teach(model)
    bake(model)
    return model, sum(row.left != "" for row in fold_targets(model, batches[0][:2]).rows)


def train_with_labels(model: nn.Module, loader: MemoryLoader, steps: int, lr: float) -> None:
    """AdamW with one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    scheduler = OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    model.train()
    for images, labels in islice(chain.from_iterable(repeat(loader)), steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def changed_answers(now: Predictions, original: Predictions) -> float:
    """Share of the images whose class is not that of the original network."""
    return (now.logits.argmax(1) != original.logits.argmax(1)).double().mean().item()


def machine_note(machine: Machine, threads: int) -> str:
    """What a result was measured on."""
    where = torch.cuda.get_device_name() if machine.device.type == "cuda" else "CPU"
    return f"{where}, {threads} threads, torch {torch.__version__}"


def write_json(result: Any, file: Path) -> None:
    """A dataclass as a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(result), indent=1) + "\n")


def percent(values: Sequence[float], digits: int) -> str:
    """The mean in percent, with the standard deviation where there are several values."""
    spread = f" ± {100 * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.{digits}f}{spread} %"
