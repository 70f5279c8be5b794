"""match_targets: targets ``a * f(w*x + c) + b`` fitted to what a trained network computes.

Sites are fitted one after the other in the order in which they run, while the sites before them
already run at their fitted targets. The inputs come from this network, the values to be fitted from
the original one on the same batch: as in GPTQ and AdaRound, each site also corrects what those
before it distort.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._dataflow import norms_behind
from transfer_surgery._running import as_batches, kl_divergence, prediction_mode
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.matching.layer_refit import layers_to_refit, refit_layer
from transfer_surgery.matching.least_squares import Inputs, Solution, TargetFit, grouped
from transfer_surgery.matching.match_report import MatchReport, MatchRow, warn_of_poor_fits
from transfer_surgery.matching.site_gradients import site_calls
from transfer_surgery.matching.target_families import family_of
from transfer_surgery.matching.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation, select_units

RIDGE = 1e-4
"""Added to the diagonal of the fits, as a share of the features' mean squares."""

_FLOOR = 0.01  # least weight of an error with weights="gradient", as a share of the mean weight


def match_targets(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Any = None,
    exclude: Any = None,
    weights: str | None = None,
    refit: bool = False,
) -> MatchReport:
    """Fit the targets of a converted model to its sources, on batches without labels.

    A fitted target is ``a * target(w*x + c) + b`` with one ``(a, w, c, b)`` per gate: parameters of
    the unit, saved with the gates and trained with the model. The gates stay where they are. While
    they are at the source, the outputs do not change; `swap_targets` moves all of them at once, a
    `TransferSchedule` moves them in training. If some gates are at the target already, as after
    ``swap_targets(keep=...)``, the sites that are at their source as a whole are left out.

    Args:
        model: a converted model; it is run in evaluation mode.
        batches: tensors, tuples of arguments or dicts of keyword arguments, without labels; some
            hundred examples are enough. Both networks are run up to each site on each batch, so
            the time grows with the square of the depth. Memory is that of one batch.
        include: sites to match: patterns as in `convert` (a predicate gets the unit); None: all.
        exclude: sites to leave as they are, in the same forms.
        weights: how much an error at a site counts. None: all errors count the same.
            ``"gradient"``: by the squared gradient of the original network's log-likelihood, with
            labels drawn from its answers, as in second-order quantisation; it takes a backward pass
            per site and batch. On an image classifier this was worse than None. It is here for
            networks with rare outputs: a detector of rare events lost most of them by
            ``refit=True`` and kept them with gradient weights.
        refit: also refit each linear layer and ordinary convolution behind a site, by least
            squares, so that its outputs stay close to those of the original network. Layers whose
            weight is not a plain trainable parameter of their own are left alone; the report names
            them. The new weights
            suit the targets and not the sources: as long as gates are at the source, **the outputs
            are wrong, and swap_targets(model) has to be the next call**. The report says so. (Or
            swap first: a swapped network can be matched and refitted, too.)

    Returns:
        A row per site: share of the variance that is explained, periods that the data spans, and
        how far the outputs, read as logits, are from the original ones with this site and those
        before it swapped.

    Raises:
        ValueError: the model is not converted, there are no batches or NaN in them, a pattern
            matches nothing, or ``weights`` is unknown.
        TypeError: the model is sharded by FSDP2. After any error the model is unchanged.

    Examples:
        >>> from transfer_surgery import convert
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(512, 4)
        >>> found = match_targets(convert(model, "sin", example_input=x), [x])
        >>> bool(found.rows[0].r2 > 0.9)
        True
    """
    if weights not in (None, "gradient"):
        raise ValueError(f"weights={weights!r}: use None or 'gradient'.")
    check_not_sharded(model)
    units = _without_kept(select_units(model, include, exclude))
    networks = TwoNetworks(model, list(units.values()), as_batches(batches, model))
    before = {unit: _numbers(unit) for unit in units.values()}
    refitted: dict[nn.Module, str | None] = {}
    try:
        with prediction_mode(model):
            rows = tuple(_fit_in_order(networks, units, weights, refitted if refit else None))
    except BaseException:
        networks.restore()
        for unit, numbers in before.items():
            _put_back(unit, numbers)
        raise
    reasons = {p: refitted[m] for p, m in model.named_modules() if m in refitted}
    paths = tuple(path for path, reason in reasons.items() if reason is None)
    left = {path: reason for path, reason in reasons.items() if reason is not None}
    waiting = any(bool((unit.gate.predict() != 0).all()) for unit in units.values())
    report = MatchReport(rows, paths, left, needs_swap=bool(paths) and waiting)
    warn_of_poor_fits(report, stacklevel=3)
    return report


def _without_kept(units: dict[str, GatedActivation]) -> dict[str, GatedActivation]:
    """Without sites that are at their source as a whole, if other sites have transferred gates."""
    z = {path: unit.gate.predict().detach() for path, unit in units.items()}
    if not any(bool((gates == 0).any()) for gates in z.values()):
        return units
    return {path: unit for path, unit in units.items() if not bool((z[path] == 1).all())}


def _fit_in_order(
    networks: TwoNetworks,
    units: dict[str, GatedActivation],
    weights: str | None,
    refitted: dict[nn.Module, str | None] | None,
) -> Iterator[MatchRow]:
    """Fit each site and, unless ``refitted`` is None, each layer behind one; a row per site.

    ``refitted`` gets these layers, with the reason where one was left alone.
    """
    first = networks.batches[0]
    wanted = networks.log_probabilities(first)
    paths = {unit: path for path, unit in units.items()}

    # Find out what runs, how often, and which batch norms can take an offset.
    layers, left = ([], {}) if refitted is None else layers_to_refit(networks.model)
    norms = norms_behind(networks.model, layers, lambda: networks.run(first)) if layers else {}
    calls_of = networks.count_calls([*units.values(), *layers, *left])

    done: set[GatedActivation] = set()
    for module, calls in calls_of.items():
        if isinstance(module, GatedActivation):
            # Fit the site, then let it run at its target.
            solution, inputs = _fit_site(networks, module, calls, done, weights)
            if not all(bool(p.isfinite().all()) for p in solution.parameters):
                raise ValueError(
                    f"{paths[module]}: NaN or infinity comes in there. Look for it in the batches; "
                    "a network that overflows in half precision is matched in float32."
                )
            _write(module, solution)
            done.add(module)
            divergence = kl_divergence(networks.log_probabilities(first, done, "now"), wanted)
            yield _row(paths[module], module, solution, inputs, divergence.item())
        elif done and refitted is not None:
            refitted[module] = left.get(module)
            if module not in left:
                refit_layer(networks, module, calls, done, norms.get(module))

    # List what did not run.
    for unit in paths.keys() - done:
        yield MatchRow(paths[unit], str(unit.source), str(unit.target), None, None, None, None)


def _fit_site(
    networks: TwoNetworks,
    unit: GatedActivation,
    calls: int,
    done: Collection[GatedActivation],
    weights: str | None,
) -> tuple[Solution, Inputs]:
    """The least squares of one site, which runs ``calls`` times on a batch."""

    def group(x: Tensor) -> Tensor:
        return grouped(x, unit.granularity)

    # First pass: what the inputs are like.
    inputs = Inputs()
    for batch in networks.batches:
        for x, _ in networks.see(unit, batch, calls, done, "now"):
            inputs.add(group(x))
    # Second pass: the sums, from inputs of this network and outputs of the original one.
    fit = TargetFit(family_of(unit.target), inputs, RIDGE)
    for index, batch in enumerate(networks.batches):
        here = networks.see(unit, batch, calls, done, "now")
        wanted = networks.see(unit, batch, calls)
        counted: list[Tensor | None] = [None] * len(wanted)
        if weights == "gradient":
            seen = site_calls(networks, [unit], batch, seed=index)[unit]
            counted = [group(_with_floor(call.squared_gradient)) for call in seen[:calls]]
        for (x, _), (_, y), weight in zip(here, wanted, counted, strict=True):
            fit.add(group(x), group(y), weight)
    return fit.solve(), inputs


def _with_floor(weights: Tensor) -> Tensor:
    """Weights with the mean 1, none of which is next to nothing."""
    mean = weights.mean()
    if not bool(mean > 0):
        return torch.ones_like(weights)
    return (weights / mean + _FLOOR) / (1 + _FLOOR)


def _row(
    path: str, unit: GatedActivation, solution: Solution, inputs: Inputs, divergence: float
) -> MatchRow:
    total = solution.total.sum()
    explained = 1 - solution.residual.sum() / total if total > 0 else torch.ones(())
    _, w, _, _ = solution.parameters
    periods = (w.abs() * inputs.span * inputs.std / (2 * torch.pi)).median()
    periodic = unit.target.name in ("sin", "cos")
    return MatchRow(
        path,
        str(unit.source),
        str(unit.target),
        explained.item(),
        periods.item() if periodic else None,
        divergence,
        inputs.count,
    )


def _numbers(unit: GatedActivation) -> dict[str, Tensor] | None:
    """A copy of the numbers of a unit's fitted target, if it has one."""
    if unit.fitted is None:
        return None
    return {name: p.detach().clone() for name, p in unit.fitted.named_parameters()}


def _put_back(unit: GatedActivation, numbers: dict[str, Tensor] | None) -> None:
    if numbers is None:
        unit.fitted = None
    elif unit.fitted is not None:
        unit.fitted.load_state_dict(numbers)


def _write(unit: GatedActivation, solution: Solution) -> None:
    target = unit.add_fitted_target()
    for name, values in zip(("a", "w", "c", "b"), solution.parameters, strict=True):
        parameter = getattr(target, name)
        parameter.data = values.to(parameter).reshape(parameter.shape)
