"""Does the transfer arrive where it was asked to, whatever the optimizer and the learning rate?

    python benchmarks/controller.py --table docs/controller.md

Each run converts the same trained network, trains on for some steps and compares the mean of
P(z != 0) after every step, computed here in float64 by Eq. 14, with the curve of the schedule.
"""

from __future__ import annotations

import copy
import datetime
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import timm.optim
import torch
import torch.nn.functional as F
import typer
from markdown_page import markdown_table
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from transfer_surgery import FrozenGatesWarning, TransferSchedule, convert, report, wrap_optimizer
from transfer_surgery.units import gated_activations

MODELS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 4},
}
FACTORS = (0.1, 1.0, 10.0)
MODES = ("projection", "gamma")
BATCH, TRAINED = 32, 100


@dataclass(frozen=True)
class Recipe:
    """An optimizer as people use it, and its usual learning rate."""

    lr: float
    make: Callable[[Any, float], Optimizer]
    cosine: bool = False


def sgd(params: Any, lr: float) -> Optimizer:
    return SGD(params, lr=lr, momentum=0.9, weight_decay=1e-4)


RECIPES = {
    "SGD": Recipe(0.05, sgd),
    "SGD + cosine": Recipe(0.05, sgd, cosine=True),
    "Adam": Recipe(1e-3, lambda params, lr: Adam(params, lr=lr)),
    "AdamW": Recipe(1e-3, lambda params, lr: AdamW(params, lr=lr, weight_decay=0.05)),
    "Lion (timm)": Recipe(1e-4, lambda params, lr: timm.optim.Lion(params, lr, weight_decay=0.5)),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run: largest deviation from the asked mean, and the share transferred at the end."""

    deviation: float
    transferred: float
    frozen: bool


def main(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps of each run.")] = 100,
    gamma: Annotated[
        float, typer.Option(help="Weight of the risk in the runs without schedule.")
    ] = 500.0,
    models: Annotated[
        list[str] | None, typer.Option(help="Names of models; by default all.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 2,
    table: Annotated[Path | None, typer.Option(help="File to write the page to, too.")] = None,
) -> None:
    """Compare asked and reached gates for every optimizer, learning rate and network."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = digits()
    rows = []
    for name in models or MODELS:
        network = trained(name, images, labels)
        runs = [(label, factor) for label in RECIPES for factor in FACTORS]
        for label, factor in track(runs, description=name, console=Console(stderr=True)):
            outcomes = [
                run(
                    copy.deepcopy(network),
                    RECIPES[label],
                    factor,
                    mode,
                    steps,
                    gamma,
                    images,
                    labels,
                )
                for mode in MODES
            ]
            rows.append((name, label, factor, outcomes))
    text = markdown(rows, steps, gamma)
    print(text)
    if table is not None:
        table.write_text(text + "\n")


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's scanned digits, 8x8, enlarged to 3x32x32."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1), torch.tensor(found.target)


def batches(images: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(images), (BATCH,), generator=generator)
        yield images[at], labels[at]


def trained(name: str, images: Tensor, labels: Tensor) -> nn.Module:
    """A network that has learned the digits a little: 100 steps of Adam."""
    model = timm.create_model(name, num_classes=10, **MODELS[name]).train()
    optimizer = Adam(model.parameters(), lr=1e-3)
    for x, y in batches(images, labels, TRAINED):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def run(
    model: nn.Module,
    recipe: Recipe,
    factor: float,
    mode: str,
    steps: int,
    gamma: float,
    images: Tensor,
    labels: Tensor,
) -> Outcome:
    torch.manual_seed(0)
    convert(model, example_input=images[:2], seed=0)
    schedule = TransferSchedule(steps)
    settings: dict[str, Any] = {"transfer": schedule} if mode == "projection" else {"gamma": gamma}
    optimizer = recipe.make(model.parameters(), recipe.lr * factor)
    wrap_optimizer(optimizer, model, **settings)
    scheduler: LRScheduler | None = CosineAnnealingLR(optimizer, steps) if recipe.cosine else None
    deviation = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, (x, y) in enumerate(batches(images, labels, steps), start=1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            deviation = max(deviation, abs(mean_probability(model) - schedule.budget(step)))
    frozen = any(issubclass(w.category, FrozenGatesWarning) for w in caught)
    return Outcome(deviation, report(model).total.transferred, frozen)


def mean_probability(model: nn.Module) -> float:
    """Eq. 14 in float64, with the paper's temperature and stretch."""
    log_alpha = torch.cat([u.log_alpha.detach().flatten() for _, u in gated_activations(model)])
    return torch.sigmoid(log_alpha.double() - 2 / 3 * math.log(0.1 / 1.1)).mean().item()


def markdown(rows: list[tuple[str, str, float, list[Outcome]]], steps: int, gamma: float) -> str:
    head = ["network", "optimizer", "lr"]
    head += [f"{mode}: {what}" for mode in MODES for what in ("deviation", "transferred")]
    lines = []
    for name, label, factor, outcomes in rows:
        cells = [name.removesuffix("_patch16_224"), label, f"{RECIPES[label].lr * factor:g}"]
        for outcome in outcomes:
            frozen = " (frozen)" if outcome.frozen else ""
            cells += [f"{outcome.deviation:.4f}", f"{outcome.transferred:.1%}{frozen}"]
        lines.append(cells)
    table = markdown_table(head, lines)
    worst = [max(outcomes[i].deviation for *_, outcomes in rows) for i in range(len(MODES))]
    summary = ", ".join(f"{mode} {value:.4f}" for mode, value in zip(MODES, worst, strict=True))
    versions = f"torch {torch.__version__}, timm {timm.__version__}, {datetime.date.today()}, CPU"
    options = f"--steps {steps} --gamma {gamma:g} --threads {torch.get_num_threads()}"
    command = f"python benchmarks/controller.py {options} --table docs/controller.md"
    return f"""# Asked and reached

{versions}. Generated, do not edit; the figures are of the code of that day:

    {command}

Networks that have learned scikit-learn's digits for {TRAINED} steps are converted to sin and
trained for another {steps} steps of {BATCH} images, with gradients clipped at norm 1. The curve of
`TransferSchedule({steps})` asks for all gates, from step {steps // 10} to step {steps * 7 // 10}.
*Deviation* is the largest distance, over all steps, between the asked and the reached mean of
P(z != 0) (Eq. 14, in float64). *Transferred* is the share of the gates that predict exactly 0 after
the last step.

- *projection*: `wrap_optimizer(..., transfer=TransferSchedule({steps}))`.
- *gamma*: the constant `gamma={gamma:g}` in every row, with the lr of the row. Nothing is asked of
  it; its deviation is from the same curve. (frozen) means that there was a `FrozenGatesWarning`,
  which looks every 200 steps.

{table}

Largest deviation of all rows: {summary}."""


if __name__ == "__main__":
    typer.run(main)
