"""activation_sparsity: which share of what the activations give is exactly zero."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transfer_surgery._running import as_batches, call_model, prediction_mode
from transfer_surgery.reports import Column, Table
from transfer_surgery.sites import find_activations
from transfer_surgery.surgery.baking import MixedActivation
from transfer_surgery.surgery.conversion import convert
from transfer_surgery.units import FittedActivation, GatedActivation

_FITTED = (FittedActivation, MixedActivation)
"""What `bake` leaves where a site is more than an activation by itself."""


@dataclass(frozen=True)
class SparsityRow:
    """One site, or all of them.

    Args:
        path: where its module lives; ``"total"``.
        zeros: how many elements of its outputs are exactly zero.
        elements: how many there are, over all batches; 0: the site did not run.
    """

    path: str
    zeros: int
    elements: int

    @property
    def share(self) -> float | None:
        """Zeros among the elements; None where the site did not run."""
        return self.zeros / self.elements if self.elements else None


@dataclass(frozen=True, repr=False)
class Sparsity(Table[SparsityRow]):
    """Exact zeros site by site: a table whose rows are in the order of the model's modules."""

    columns = (
        Column("path"),
        Column("elements", text=","),
        Column("share", "zeros", lambda share: "not run" if share is None else f"{share:.1%}"),
    )

    @property
    def total(self) -> SparsityRow:
        """All elements of all sites together: large outputs count for more."""
        zeros, elements = (
            sum(getattr(r, name) for r in self.rows) for name in ("zeros", "elements")
        )
        return SparsityRow("total", zeros, elements)

    def total_row(self) -> SparsityRow:
        return self.total


def activation_sparsity(model: nn.Module, batches: Iterable[Any]) -> Sparsity:
    """Count exact zeros in the output of each site: what a kernel for sparse inputs could skip.

    It is meant for before and after, so that any model will do. Of a converted one, its units are
    counted, with their gates of prediction. A baked one, or one that was never converted, is run as
    a copy with a unit at each of its hidden activations, functional ones too: the copy computes the
    same, and its rows have the paths that `convert` gives.

    A matched target ``a * f(w*x + c) + b`` has its offset where ``f`` has zeros. They are there
    again once `fold_targets` has moved ``b`` into the next layer.

    Args:
        model: converted, baked, or as it was; it is run in evaluation mode and not changed.
        batches: inputs without labels, as for `match_targets`.

    Returns:
        A row per site, and their total.

    Raises:
        ValueError: there are no batches, or the model has no activations.

    Examples:
        >>> import torch
        >>> from transfer_surgery import bake, swap_targets
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
        >>> activation_sparsity(model, [x]).total.share
        0.0
        >>> print(activation_sparsity(bake(swap_targets(convert(model, "relu"))), [x]))
        path   elements  zeros
        ----------------------
        1         1,024  53.7%
        ----------------------
        total     1,024  53.7%
    """
    batches = as_batches(batches, model)
    if not any(isinstance(module, GatedActivation) for module in model.modules()):
        model = _copy_with_units(model, batches[0])
    counted = {
        path: _Zeros(module)
        for path, module in model.named_modules()
        if isinstance(module, (GatedActivation, *_FITTED))
    }
    try:
        with prediction_mode(model):
            for batch in batches:
                call_model(model, batch)
    finally:
        for zeros in counted.values():
            zeros.handle.remove()
    return Sparsity(tuple(SparsityRow(path, z.zeros, z.elements) for path, z in counted.items()))


class _Zeros:
    """Counts while a module is called."""

    def __init__(self, module: nn.Module) -> None:
        self.zeros = self.elements = 0
        self.handle = module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.elements += output.numel()
        self.zeros += output.numel() - int(output.count_nonzero())


def _copy_with_units(model: nn.Module, batch: Any) -> nn.Module:
    """A copy with units at their sources, except in what `bake` left of fitted and mixed sites."""
    model = copy.deepcopy(model)
    plan = find_activations(model, batch).filter(lambda s: not issubclass(s.owner_type, _FITTED))
    fitted = any(isinstance(module, _FITTED) for module in model.modules())
    if fitted and not any(site.role == "hidden" and site.reason is None for site in plan):
        return model
    return convert(model, "identity", plan=plan, granularity="layer")
