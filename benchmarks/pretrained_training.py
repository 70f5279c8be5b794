"""How the study of matched targets trains: with labels, the original's outputs, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import typer
from pretrained_recipes import Recipe
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from transfer_surgery import (
    GatedActivation,
    TransferSchedule,
    bake,
    distill,
    report,
    sensitivity,
    wrap_optimizer,
)
from transfer_surgery.cli.finetuning.images import ImageData, Unlabelled
from transfer_surgery.matching.distilling.distill_loss import softened_divergence

STAGES = ("layer1", "layer2", "layer3")


def train(
    recipe: Recipe,
    model: nn.Module,
    teacher: nn.Module,
    batches: list[Tensor],
    data: ImageData,
    compiled: bool,
) -> tuple[list[float], float]:
    """Train where the recipe has steps; then a baked network. Losses, transferred fraction."""
    if recipe.lesson == "teacher" and recipe.opt != "adamw":
        raise typer.BadParameter("distill uses AdamW: --opt adamw --lr 1e-3")
    soft = recipe.transfer != "hard"
    losses: list[float] = []
    transferred = 0.0
    if recipe.start != "relu" and not soft and recipe.lesson != "teacher":
        transferred = _finish(model)
    if recipe.steps:
        if compiled:  # `distill` runs both as written nonetheless
            teacher.compile()
            model.compile()
        if recipe.lesson == "teacher":
            losses = distill(
                model,
                teacher,
                Unlabelled(data.train),
                steps=recipe.steps,
                loss="kl",
                lr=recipe.lr,
                features=STAGES,
                variation=0.0,  # the images are augmented
            )
        else:
            schedule = _schedule_of(recipe, model, batches) if soft else None
            losses = list(_train(recipe, model, teacher, schedule, data))
        model._compiled_call_impl = None
    if any(isinstance(module, GatedActivation) for module in model.modules()):
        transferred = _finish(model)
    return losses, transferred


def _finish(model: nn.Module) -> float:
    """Bake; the fraction that was transferred."""
    transferred = report(model).total.transferred
    bake(model)
    return transferred


def _train(
    recipe: Recipe,
    model: nn.Module,
    teacher: nn.Module,
    schedule: TransferSchedule | None,
    data: ImageData,
) -> Iterator[float]:
    """Train with the labels, and with the teacher's answers where the lesson is ``both``."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 and "log_alpha" not in n]
    groups = [
        {"params": decayed, "weight_decay": 1e-4},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if recipe.opt == "adamw":
        optimizer = torch.optim.AdamW(groups, recipe.lr)
    else:
        optimizer = torch.optim.SGD(groups, recipe.lr, momentum=0.9, nesterov=True)
    if schedule:
        wrap_optimizer(optimizer, model, transfer=schedule)
    scheduler = CosineAnnealingLR(optimizer, recipe.steps)
    model.train()
    done = 0
    while True:
        for images, labels in data.train:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if recipe.lesson == "both":
                with torch.no_grad():
                    wanted = teacher(images)
                loss = loss + softened_divergence(logits, wanted, 4.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decayed + others, 2.0)
            optimizer.step()
            scheduler.step()
            yield loss.item()
            done += 1
            if done == recipe.steps or not loss.isfinite():
                return


def _schedule_of(recipe: Recipe, model: nn.Module, batches: list[Tensor]) -> TransferSchedule:
    if recipe.transfer == "line":
        return TransferSchedule(recipe.steps, start=0, end=1.0, shape="linear")
    order: Any = recipe.order
    if order == "sensitivity":
        order = sensitivity(model, batches[:2], logits=True).order
    return TransferSchedule(recipe.steps, order=order)
