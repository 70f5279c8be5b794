"""Whether the outcome of Figure 1 depends on what the paper leaves open."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from transfer_surgery import FrozenGatesWarning
from transfer_surgery.reproduce.figure1 import NETWORKS, Fit, fit
from transfer_surgery.reproduce.rows import find_row
from transfer_surgery.reproduce.tables import markdown

__all__ = ["sensitivity", "sensitivity_table"]

_WORDS = {
    "steps": "{} steps",
    "lr": "learning rate {}",
    "weight_decay": "weight decay {}",
    "points": "{} points",
    "batch": "mini-batches of {}",
    "gamma": "gamma {}",
    "gate_lr": "gates' learning rate x {}",
    "init": "{} from N(8, 1)",
}
_SHARES = ("found", "transferred")
_PHRASES = {
    ("optimizer", "adam"): "Adam",
    ("optimizer", "sgd"): "SGD",
    ("batch", 0): "full batch",
    ("noise", "none"): "no noise",
    ("noise", "batch"): "one draw of the gate per batch",
    ("noise", "example"): "one draw of the gate per example",
}

_GATES: tuple[dict[str, Any], ...] = (
    *({"gate_lr": speed, "gamma": gamma} for speed, gamma in product((0.1, 0.25, 1), (0.1, 1, 10))),
    {"gate_lr": 0.025, "steps": 8000},
    {"lr": 0.02, "gate_lr": 0.1, "steps": 8000},
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
    {"points": 513},
    {"batch": 32},
    {"weight_decay": 1e-4},
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


def sensitivity_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per row of `sensitivity`, as a table in GitHub's Markdown.

    Columns are, for each network, the share of the seeds that found the sine of w = 2, the share of
    those whose gate was transferred, where there is a gate, and the median of the final w. A
    network that was not looked at has empty cells.

    Args:
        rows: what `sensitivity` returned, or its JSON.

    Examples:
        >>> summary = {"found": 0.5, "transferred": 1.0, "w": 2.0}
        >>> row = {"changed": {"noise": "none", "points": 65}, "networks": {"resin->sin": summary}}
        >>> print(sensitivity_table([row]))
        | changed | resin->sin: found | gate transferred | median w |
        |---|---|---|---|
        | no noise, 65 points | 50 % | 100 % | 2.00 |
    """
    networks = list(dict.fromkeys(name for row in rows for name in row["networks"]))
    head = ["changed"]
    for name in networks:
        head += [f"{name}: found", *_gate(name, "gate transferred"), "median w"]
    return markdown(head, ([_in_words(row["changed"]), *_cells(row, networks)] for row in rows))


def _gate(network: str, cell: str) -> list[str]:
    """The cell, if that network has a gate."""
    return [cell] if find_row(network).gate else []


def _in_words(changed: Mapping[str, Any]) -> str:
    words = (
        _PHRASES.get(item) or _WORDS.get(item[0], f"{item[0]} {{}}").format(item[1])
        for item in changed.items()
    )
    return ", ".join(words).replace("_", " ") or "nothing"


def _cells(row: Mapping[str, Any], networks: Sequence[str]) -> list[str]:
    cells = []
    for name in networks:
        found, transferred, w = "", "", ""
        if summary := row["networks"].get(name):
            found, transferred = (f"{summary[key]:.0%}".replace("%", " %") for key in _SHARES)
            w = f"{summary['w']:.2f}"
        cells += [found, *_gate(name, transferred), w]
    return cells
