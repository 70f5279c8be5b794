"""swap_targets: all gates go to the target at once, without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.matching.swapping.relu_budget import choose_kept
from transfer_surgery.transfer import move_to_ends, project, tell_schedules
from transfer_surgery.units import select_units


@torch.no_grad()
def swap_targets(
    model: nn.Module,
    *,
    include: Any = None,
    exclude: Any = None,
    keep: int | float | None = None,
    batches: Iterable[Any] | None = None,
    logits: bool = False,
) -> nn.Module:
    """Transfer gates at once; a `TransferSchedule` moves them gradually instead.

    With plain targets this breaks a trained network. After `match_targets` it is the start of
    distillation or training. In the middle of a `TransferSchedule` the next step of the optimizer
    moves the gates to the schedule's budget again, and warns.

    Args:
        model: a converted model.
        include: sites to swap: patterns as in `convert` (a predicate gets the unit); None: all.
        exclude: sites to leave as they are, in the same forms.
        keep: how many neurons of these sites keep their source at most: a number (int) or a share
            (float). The gates whose swap would change the outputs most per neuron are kept, which
            is estimated from squared gradients; ``report(model).total.source_neurons`` counts their
            neurons, for each example of the largest batch (the first axis of its first tensor). One
            gate per neuron gives the finest choice, one per channel a faster network.
            Call `match_targets` once more afterwards: it fits the others around those that stay.
        batches: inputs without labels, as for `match_targets`; needed with ``keep``.
        logits: whether the model returns logits of classes, so that ``keep`` goes by their KL
            divergence; else by the relative squared errors of all outputs. Outputs that are named
            ``logits`` are read so in any case.

    Returns:
        The same model object.

    Raises:
        ValueError: the model is not converted, a pattern matches nothing, or ``keep`` is out of its
            range, is given without ``batches``, or the gates have no ``log_alpha``.
        TypeError: the model is sharded by FSDP2.

    Warns:
        MatchWarning: ``keep`` is smaller than any gate.

    Examples:
        >>> from transfer_surgery import bake, convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 4))
        >>> bake(swap_targets(model))
        Sequential(
          (0): ActivationModule(sin)
        )
    """
    check_arguments(swap_targets, locals())
    check_not_sharded(model)
    units = select_units(model, include, exclude)
    if (keep is None) != (batches is None):
        raise ValueError("give keep= and batches= together: the batches say which gates to keep.")
    if keep is not None and batches is not None:
        scheduled = [path for path, unit in units.items() if not unit.gate.learned]
        if scheduled:
            kind = units[scheduled[0]].gate.settings.name
            raise ValueError(
                f"{scheduled[0]}: gates of the kind {kind!r} move all at once; convert "
                "with gate='hard_concrete' to keep some of them."
            )
        for unit, kept in choose_kept(model, units, batches, keep, logits).items():
            move_to_ends(unit.gate, kept.to(unit.log_alpha.device))
        tell_schedules(units.values())
        return model
    for unit in units.values():
        if unit.gate.learned:
            project([unit.gate], 1.0)
        else:
            unit.gate.progress.fill_(1.0)
    tell_schedules(units.values())
    return model
