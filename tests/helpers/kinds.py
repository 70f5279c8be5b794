"""What a site may have become: kept, transferred, mixed, matched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from transfer_surgery import GatedActivation
from transfer_surgery.units import gated_activations

Kind = Callable[[GatedActivation], None]


@torch.no_grad()
def become(model: nn.Module, *kinds: Kind) -> nn.Module:
    """Let the sites of a converted model become, in turn, of these kinds."""
    for i, (_, unit) in enumerate(gated_activations(model)):
        kinds[i % len(kinds)](unit)
    return model


def keep(unit: GatedActivation) -> None:
    unit.log_alpha.fill_(8.0)


def transfer(unit: GatedActivation) -> None:
    unit.log_alpha.fill_(-8.0)


def mix(unit: GatedActivation) -> None:
    unit.log_alpha.copy_(torch.randn_like(unit.log_alpha) * 3)


def match(unit: GatedActivation) -> None:
    transfer(unit)
    for parameter in unit.add_fitted_target().parameters():
        parameter.add_(0.2 * torch.rand_like(parameter))


def match_and_mix(unit: GatedActivation) -> None:
    match(unit)
    mix(unit)


KINDS = (keep, transfer, mix, match, match_and_mix)
