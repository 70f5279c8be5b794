"""One step of `match_targets`: the fit of a site, or the refit of a layer behind one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from transfer_surgery.matching.fit_weights import gradient_weights, next_layer_weights
from transfer_surgery.matching.layer_refit import LayerFit
from transfer_surgery.matching.least_squares import Inputs, NormalEquations, Solution, grouped
from transfer_surgery.matching.target_families import family_of
from transfer_surgery.matching.two_networks import SideBySide
from transfer_surgery.units import GatedActivation


def fit_site(
    networks: SideBySide,
    unit: GatedActivation,
    calls: int,
    symmetric: bool,
    weights: str | None,
    families: dict[str, Any],
    ridge: float,
) -> tuple[Solution, Inputs]:
    """The least squares of one site, in two passes: what its inputs are like, then the sums.

    Args:
        networks: both networks; those sites are swapped that ran before.
        unit: the site.
        calls: how often it runs on a batch.
        symmetric: fit to what the source makes of the same input.
        weights: one of `transfer_surgery.matching.fit_weights.WEIGHTS`.
        families: arguments of `transfer_surgery.matching.target_families.family_of`.
        ridge: of the fit.
    """

    def group(x: Tensor) -> Tensor:
        return grouped(x, unit.granularity, unit.channel_axis)

    inputs = Inputs()
    for batch in networks.batches:
        with networks.matched():
            for x, _ in networks.see(unit, batch, calls):
                inputs.add(group(x))
    of_channels = None
    if weights == "next_layer":
        of_channels = next_layer_weights(networks, unit, x)
    equations = NormalEquations(family_of(unit.target, **families), inputs, ridge)
    for index, batch in enumerate(networks.batches):
        with networks.matched():
            here = networks.see(unit, batch, calls)
        wanted = here
        if not symmetric:
            with networks.original():
                wanted = networks.see(unit, batch, calls)
        counted: list[Tensor | None] = [None] * len(wanted)
        if weights == "gradient":
            counted = [*gradient_weights(networks, unit, batch, calls, seed=index)]
        elif of_channels is not None:
            counted = [of_channels.expand_as(y) for _, y in wanted]
        for (x, _), (_, y), weight in zip(here, wanted, counted, strict=True):
            equations.add(group(x), group(y), None if weight is None else group(weight))
    return equations.solve(), inputs


def refit_layer(
    networks: SideBySide, layer: nn.Module, calls: int, norm: nn.Module | None, ridge: float
) -> None:
    """New weights of a layer for the inputs that it gets now; a norm behind it takes the offset."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    fit = LayerFit(layer, ridge, intercept=norm is not None)
    for batch in networks.batches:
        with networks.original():
            wanted = networks.see(layer, batch, calls)
        with networks.matched():
            here = networks.see(layer, batch, calls)
        for (x, _), (_, y) in zip(here, wanted, strict=True):
            fit.add(x, y)
    found = fit.solve()
    if norm is not None and layer.bias is None:
        # In training the statistics of the batch do what this does in evaluation.
        mean = norm.running_mean
        assert isinstance(mean, Tensor)
        networks.assign(norm, {"running_mean": mean - found.pop("bias")})
    networks.assign(layer, found)


def write(unit: GatedActivation, solution: Solution) -> None:
    """Give a unit the numbers that were found."""
    target = unit.free_target()
    names = ("a", "w", "c", "b")
    for name, values in zip(names, solution.parameters, strict=True):
        parameter = getattr(target, name)
        parameter.data = values.to(parameter).reshape(parameter.shape)
