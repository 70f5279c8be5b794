"""match_targets: targets ``a * f(w*x + c) + b`` fitted to what a trained network computes.

Site by site in the order in which they run, with the sites before at their fitted targets already.
The inputs come from this network, the values to be fitted from the original one on the same batch:
each site also makes up for what those before it distort, as in GPTQ and AdaRound.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._running import as_batches, prediction_mode
from transfer_surgery._sharding import refuse_sharded
from transfer_surgery.matching.fit_weights import WEIGHTS
from transfer_surgery.matching.layer_refit import can_be_refitted, norms_behind, sharing_weights
from transfer_surgery.matching.least_squares import Inputs, Solution
from transfer_surgery.matching.match_report import MatchReport, MatchRow, MatchWarning
from transfer_surgery.matching.match_site import fit_site, refit_layer, write
from transfer_surgery.matching.swap import swap_targets
from transfer_surgery.matching.two_networks import SideBySide
from transfer_surgery.units import GatedActivation, matching_units

FREQUENCIES = (0.4, 0.6, 0.8, 1.0, 1.3)
POOR = 0.5
FEW = 30


def match_targets(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Any = None,
    exclude: Any = None,
    symmetric: bool = False,
    weights: str | None = None,
    refit: bool = False,
    frequencies: Sequence[float] = FREQUENCIES,
    min_periods: float = 0.5,
    ridge: float = 1e-4,
    refit_ridge: float = 1e-2,
) -> MatchReport:
    """Fit the targets of a converted model to its sources, on batches without labels.

    A matched target is ``a * target(w*x + c) + b`` with one ``(a, w, c, b)`` per gate: parameters
    of the unit, saved with the gates, trained with the model. Outputs do not change while the gates
    are at the source; `swap_targets` moves all gates at once, a `TransferSchedule` in training.
    Where some gates of these sites are at the target already and others are not, as after
    ``swap_targets(keep=...)``, the others stay where they are.

    Args:
        model: a converted model; it is run in evaluation mode.
        batches: some hundred examples are enough: tensors, tuples of arguments or dicts of keyword
            arguments, without labels. Two networks are run on each batch for each site, up to the
            site: the time grows with the square of the depth, memory is that of one batch.
        include: sites to match: globs on paths, or predicates on units; None: all.
        exclude: sites to leave as they are, likewise.
        symmetric: fit to what the source makes of the *same* input, as one would do without an
            original network at hand. Errors of the sites before are then not made up for.
        weights: of the squared errors at a site. None: all count the same. ``"gradient"``: by the
            squared gradient of the original network's log-likelihood, with labels drawn from its
            answers (the diagonal of the Fisher information, as in second-order quantisation); it
            takes a backward pass per site and batch. ``"next_layer"``: by the squared weights with
            which the next layers read a channel; of use where channels share a target.
        refit: also refit the weights of each linear and convolutional layer behind a site, such
            that its outputs come near those of the original network (least squares, no training),
            and swap the sites, since the weights no longer suit the source.
        frequencies: of sinusoids, ``w`` times the standard deviation of the site's input.
        min_periods: a sinusoid spans at least so many periods over the data of its gate, but where
            that is next to constant: such a channel gets a frequency as the others have.
        ridge: of the fits, as a share of the features' mean squares.
        refit_ridge: what pulls refitted weights to the original ones, as a share of the mean square
            of the layer's inputs.

    Returns:
        A row per site: share of the variance that is explained, periods that the data spans, and
        how far the outputs, read as logits, are from the original ones with this site and those
        before swapped.

    Raises:
        ValueError: the model is not converted, there are no batches or NaN in them, a pattern
            matches nothing, or an argument is none of these.
        TypeError: the model is sharded by FSDP2. After any error the model is unchanged.

    Source: docs/design.md, "Matched targets".

    Examples:
        >>> from transfer_surgery import convert
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(512, 4)
        >>> found = match_targets(convert(model, "sin", example_input=x), [x])
        >>> bool(found.rows[0].r2 > 0.9)
        True
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: use one of {', '.join(map(str, WEIGHTS))}.")
    if not frequencies or min(frequencies) <= 0:
        raise ValueError(f"frequencies={frequencies}: give some, all positive, as {FREQUENCIES}.")
    if min(min_periods, ridge, refit_ridge) < 0:
        raise ValueError(
            f"min_periods={min_periods}, ridge={ridge}, refit_ridge={refit_ridge}: none of them "
            "can be negative."
        )
    refuse_sharded(model)
    units = _without_kept(matching_units(model, include, exclude))
    networks = SideBySide(model, list(units.values()), as_batches(batches, model))
    before = {unit: _copy(unit) for unit in units.values()}
    try:
        with prediction_mode(model):
            rows = list(
                _match(
                    networks,
                    {unit: path for path, unit in units.items()},
                    symmetric=symmetric,
                    weights=weights,
                    families={"frequencies": tuple(frequencies), "min_periods": min_periods},
                    ridge=ridge,
                    refit_ridge=refit_ridge if refit else None,
                )
            )
    except BaseException:
        _restore(networks, before)
        raise
    swapped = [unit for unit in networks.swapped if unit not in networks.partly]
    if refit and swapped:
        swap_targets(model, include=swapped)
    report = MatchReport(tuple(rows))
    few = [row.path for row in report if row.values is not None and row.values < FEW]
    poor = [row.path for row in report if row.r2 is not None and row.r2 < POOR]
    for paths, problem, remedy in (
        (few, f"a gate saw fewer than {FEW} values", "give more examples, some hundred"),
        (
            poor,
            f"less than {POOR:.0%} of the variance is explained",
            "leave these sites out (exclude=), convert with a finer granularity, or fine-tune the "
            "network",
        ),
    ):
        if paths:
            named = ", ".join(paths[:5]) + ", ..." * (len(paths) > 5)
            warnings.warn(f"{problem} at {named}: {remedy}.", MatchWarning, stacklevel=2)
    return report


def _without_kept(units: dict[str, GatedActivation]) -> dict[str, GatedActivation]:
    """Without sites that are wholly at their source, if others have transferred gates."""
    z = {path: unit.gate.predict().detach() for path, unit in units.items()}
    if not any(bool((gates == 0).any()) for gates in z.values()):
        return units
    return {path: unit for path, unit in units.items() if not bool((z[path] == 1).all())}


def _match(
    networks: SideBySide,
    paths: dict[GatedActivation, str],
    *,
    symmetric: bool,
    weights: str | None,
    families: dict[str, Any],
    ridge: float,
    refit_ridge: float | None,
) -> Iterable[MatchRow]:
    layers = [m for m in networks.model.modules() if refit_ridge is not None and can_be_refitted(m)]
    shared = sharing_weights(layers)
    norms = {}
    if layers:
        norms = norms_behind(networks.model, layers, lambda: networks.run(networks.batches[0]))
    with networks.original():
        wanted = networks.log_probabilities(networks.batches[0])
    for module, calls in networks.order([*paths, *layers]).items():
        if isinstance(module, GatedActivation):
            solution, inputs = fit_site(
                networks, module, calls, symmetric, weights, families, ridge
            )
            if not all(bool(p.isfinite().all()) for p in solution.parameters):
                raise ValueError(
                    f"{paths[module]}: NaN or infinity comes in there. Look for it in the batches; "
                    "a network that overflows in half precision is matched in float32."
                )
            write(module, solution)
            networks.swapped.add(module)
            yield _row(paths[module], module, solution, inputs, _divergence(networks, wanted))
        elif networks.swapped and module not in shared and refit_ridge is not None:
            refit_layer(networks, module, calls, norms.get(module), refit_ridge)
    for unit in paths.keys() - networks.swapped:
        yield MatchRow(paths[unit], str(unit.source), str(unit.target), None, None, None, None)


def _row(
    path: str, unit: GatedActivation, solution: Solution, inputs: Inputs, divergence: float | None
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


def _divergence(networks: SideBySide, wanted: Tensor) -> float:
    """Mean KL divergence of the first batch's outputs, read as logits, from the original ones."""
    with networks.matched():
        now = networks.log_probabilities(networks.batches[0])
    # Rounding can put it below zero, which no divergence is.
    return F.kl_div(now, wanted, log_target=True, reduction="batchmean").clamp_min(0).item()


def _copy(unit: GatedActivation) -> dict[str, Tensor] | None:
    if unit.affine is None:
        return None
    return {name: p.detach().clone() for name, p in unit.affine.named_parameters()}


def _restore(networks: SideBySide, before: dict[GatedActivation, dict[str, Tensor] | None]) -> None:
    networks.restore()
    for unit, parameters in before.items():
        if parameters is None:
            unit.affine = None
        elif unit.affine is not None:
            unit.affine.load_state_dict(parameters)
