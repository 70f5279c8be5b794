"""What keeps its source in a whole swap: neurons, sites, or as few sites as the accuracy needs."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from transfer_surgery._running import copied
from transfer_surgery.matching.match_report import MatchWarning
from transfer_surgery.matching.swapping.relu_budget import neurons_of
from transfer_surgery.matching.swapping.site_costs import sensitivity
from transfer_surgery.matching.swapping.stage_comparison import StageComparison
from transfer_surgery.matching.swapping.swap import swap_targets
from transfer_surgery.units import GatedActivation

_COST_BATCHES = 2  # that tell what each site costs: it takes a run per site and batch


@dataclass(frozen=True)
class SourceBudget:
    """One of three budgets of `swap_activations`; it says there what they mean.

    Args:
        neurons: ``keep``.
        sites: ``keep_sites``.
        points: ``keep_points``.
    """

    neurons: int | float | None
    sites: int
    points: float | None

    def __bool__(self) -> bool:
        return self.neurons is not None or self.sites != 0 or self.points is not None

    def check(self, sites: int, labels: bool) -> None:
        """Raise where there are several budgets, or one that cannot be.

        Args:
            sites: how many there are to swap.
            labels: whether there are labels.
        """
        given = (self.neurons is not None) + (self.sites != 0) + (self.points is not None)
        if given > 1:
            raise ValueError("give one of keep=, keep_sites= and keep_points=, not several.")
        if not 0 <= self.sites < sites:
            raise ValueError(
                f"keep_sites={self.sites}: there are {sites} sites to swap; keep fewer of them."
            )
        if self.points is None:
            return
        if not self.points >= 0:
            raise ValueError(f"keep_points={self.points}: give a number that is not below 0.")
        if not labels:
            raise ValueError("keep_points= needs labels=: without them no accuracy is known.")

    def check_neurons(self, units: Collection[GatedActivation]) -> None:
        """Raise where these units do not have so many neurons, or no more."""
        if self.neurons is None:
            return
        total = sum(unit.neurons for unit in units)
        if neurons_of(self.neurons, total) == total:
            raise ValueError(f"keep={self.neurons} keeps every neuron; nothing would be swapped.")

    def spend(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        logits: bool,
        fit: Callable[..., object],
        stages: StageComparison,
    ) -> None:
        """Swap all but what costs most. What a site costs is known once it is fitted.

        Args:
            model: a converted model.
            batches: inputs without labels.
            logits: whether the model returns logits of classes.
            fit: fits the swapped sites of a model, and the layers behind them unless it gets
                ``refit=False``.
            stages: has the original network as its first row.

        Raises:
            ValueError: no number of sites holds the accuracy.
        """

        def fit_quietly(network: nn.Module, **options: bool) -> None:
            with warnings.catch_warnings():  # the network that is chosen is fitted once more
                warnings.simplefilter("ignore", MatchWarning)
                fit(network, **options)

        fit_quietly(model, refit=False)
        if self.neurons is not None:
            swap_targets(model, keep=self.neurons, batches=batches, logits=logits)
            return
        order = sensitivity(model, batches[:_COST_BATCHES], logits=logits).order

        def without(number: int, network: nn.Module) -> nn.Module:
            return swap_targets(network, exclude=order[len(order) - number :])

        def holds(number: int) -> bool:
            tried = without(number, copied(model))
            fit_quietly(tried)
            return stages.points_lost(tried) <= float(self.points or 0)

        number = self.sites
        if self.points is not None:
            # The more sites stay, the better: the first number that holds is found by halving.
            number = bisect_left(range(len(order)), True, key=holds)
            if number == len(order):
                raise ValueError(
                    f"keep_points={self.points}: more is lost with every number of sites that "
                    "stay. Give more points, or more images to fit to."
                )
        without(number, model)
