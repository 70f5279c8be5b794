"""swap_targets: all gates to the target at once, without training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from transfer_surgery.projection import project
from transfer_surgery.unfit import refuse_sharded
from transfer_surgery.unit import matching_units

__all__ = ["swap_targets"]


@torch.no_grad()
def swap_targets(model: nn.Module, *, include: Any = None, exclude: Any = None) -> nn.Module:
    """Transfer gates now: the hard swap, whose opposite is a `TransferSchedule`.

    With plain targets it breaks a trained network. After `match_targets` it is where distillation,
    or training, starts.

    Args:
        model: a converted model.
        include: sites to swap: globs on paths, units, or predicates on units; None: all.
        exclude: sites to leave, likewise.

    Returns:
        The same model object.

    Raises:
        ValueError: the model is not converted, or a pattern matches nothing.
        TypeError: the model is sharded by FSDP2.

    Example:
        >>> from transfer_surgery import bake, convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 4))
        >>> bake(swap_targets(model))
        Sequential(
          (0): ActivationModule(sin)
        )
    """
    refuse_sharded(model)
    for unit in matching_units(model, include, exclude).values():
        if unit.gate.learned:
            project([unit.gate], 1.0)
        else:
            unit.gate.progress.fill_(1.0)
    return model
