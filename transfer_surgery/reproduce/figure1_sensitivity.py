"""Whether the outcome of Figure 1 depends on what the paper leaves open."""

from __future__ import annotations

import dataclasses
import warnings
from itertools import product
from typing import Any

from transfer_surgery.frozen import FrozenGatesWarning
from transfer_surgery.reproduce.figure1 import NETWORKS, Fit, fit

__all__ = ["sensitivity"]

_GATES: tuple[dict[str, Any], ...] = (
    *({"gate_lr": speed, "gamma": gamma} for speed, gamma in product((0.1, 0.25, 1), (0.1, 1, 10))),
    {"gate_lr": 0.02},
    {"noise": "none"},
    {"noise": "batch"},
    {"noise": "batch", "lr": 0.02, "gate_lr": 0.5},
    {"init": "alpha"},
    {"init": "alpha", "noise": "none"},
)
"""Changes that concern *resin->sin* alone, or are looked at in it alone."""

_TRAININGS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.02, "gate_lr": 0.25},
    {"points": 65},
    {"batch": 32},
    {"weight_decay": 0.02},
    {"optimizer": "sgd", "gate_lr": 1, "gamma": 10},
)


def sensitivity(settings: Fit) -> list[dict[str, Any]]:
    """Train again with other settings, one to three of them at a time: minutes on one core.

    Gates that are frozen are no warning here: the share of the transferred ones tells.

    Args:
        settings: what each row changes.

    Returns:
        Plain JSON, a row each: what was ``"changed"``, and ``"networks"`` with, for each network
        looked at, the share of the seeds that ``"found"`` w = 2 as a sine, the share of those whose
        gate was ``"transferred"``, and the median of ``"w"``.

    Source:
        Section 1 of the paper gives w = 6 and the interval only.
    """
    rows: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        *((changed, NETWORKS[-1:]) for changed in _GATES),
        *((changed, NETWORKS) for changed in _TRAININGS),
    ]
    return [
        {
            "changed": changed,
            "networks": {
                network: _summary(network, dataclasses.replace(settings, **changed))
                for network in networks
            },
        }
        for changed, networks in rows
    ]


def _summary(network: str, settings: Fit) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenGatesWarning)
        outcome = fit(network, settings)
    return {
        "found": outcome.found.double().mean().item(),
        "transferred": (outcome.z == 0).double().mean().item(),
        "w": round(outcome.w.median().item(), 4),
    }
