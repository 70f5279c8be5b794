"""match_targets: targets ``a * f(w*x + c) + b`` fitted to what a trained network computes.

Sites are fitted one after the other in the order in which they run, while the sites before them
already run at their fitted targets. The inputs come from this network, the values to be fitted from
the original one on the same batch: as in GPTQ and AdaRound, each site also corrects what those
before it distort.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from transfer_surgery._messages import check_arguments
from transfer_surgery._running import as_batches, prediction_mode
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.matching.fitting.target_families import Searched, family_of
from transfer_surgery.matching.match_report import MatchReport, warn_of_poor_fits
from transfer_surgery.matching.one_pass import OnePass
from transfer_surgery.matching.progress import Shown
from transfer_surgery.matching.two_networks.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation, select_units


def match_targets(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Any = None,
    exclude: Any = None,
    weights: str | None = None,
    refit: bool = False,
    offset: bool = True,
    max_bytes: int | None = None,
    logits: bool = False,
    progress: Shown = True,
) -> MatchReport:
    """Fit the targets of a converted model to its sources, on batches without labels.

    A fitted target is ``a * target(w*x + c) + b`` with one ``(a, w, c, b)`` per gate: parameters of
    the unit, saved with the gates and trained with the model. The gates stay where they are. While
    they are at the source, the outputs do not change; `swap_targets` moves all of them at once, a
    `TransferSchedule` moves them in training. If some gates are at the target already, as after
    ``swap_targets(keep=...)``, the sites that are at their source as a whole are left out.

    Args:
        model: a converted model; it is run in evaluation mode.
        batches: tensors, tuples of arguments or dicts of keyword arguments, also with tensors in
            lists and objects, without labels; some hundred examples are enough. The first one has
            to come to every site. Both networks run once on each batch, and once more for each
            module that is called several times. Under `torch.distributed` every rank calls this
            with batches of its own, and all get the same numbers.
        include: sites to match: patterns as in `convert` (a predicate gets the unit); None: all.
        exclude: sites to leave as they are, in the same forms.
        weights: how much an error at a site counts. None: all errors count the same.
            ``"gradient"``: by what they do to the outputs, as in second-order quantisation: to the
            KL divergence of logits (``logits=True``), else to the relative squared errors of all
            outputs. It takes a backward pass per batch. On an image classifier this was worse than
            None: measure before you use it.
        refit: also refit each linear layer and convolution behind a site, by least squares, so that
            its outputs stay close to those of the original network. Layers whose weight is not a
            plain trainable parameter that they alone read, and those of subclasses that compute
            something else than torch's layers, are left alone; the report names them.
            The new weights suit the targets and not the sources: as long as gates are at the
            source, **the outputs are wrong, and swap_targets(model) has to be the next call**. The
            report says so. (Or swap first: a swapped network can be matched and refitted, too.)
        offset: whether a target has an offset ``b``. False leaves it at 0 and freezes it, and makes
            no amplitude negative. Then `fold_targets` turns a ReLU behind a layer into an
            ``nn.ReLU`` without any number, also where zeros are padded or several layers read it.
            int8 code needs that: an offset that stays costs it more time than ReLU saves. Use it
            with ``refit=True``: then the offset is fitted and left out, and the layers behind make
            up for it. The R2 of the report is that with the offset.
        max_bytes: what the forward passes of both networks may hold while they wait for each other
            at a site; None: half of the memory that is free. Batches beyond it are run again for
            each site, so that their time grows with the square of the depth.
        logits: whether the model returns logits of classes, so that the report can have their KL
            divergence, too, by which ``weights="gradient"`` then goes. Outputs that are named
            ``logits`` are read so in any case.
        progress: whether to show a line with the remaining time, or a function that gets each
            ``Progress``.

    Returns:
        A row per site: where it is in the code, the share of the variance that is explained, the
        range of the inputs and the share of new ones outside of it, and how far the outputs are
        from the original ones with this site and those before it swapped.

    Raises:
        ValueError: the model is not converted, there are no batches or NaN in them, a pattern
            matches nothing, ``weights`` is unknown, or a target needs the offset that it
            must not have.
        TypeError: the model is sharded by FSDP2. After any error the model is unchanged.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(512, 4)
        >>> found = match_targets(convert(model, "sin", example_input=x), [x])
        >>> bool(found.rows[0].r2 > 0.9)
        True
    """
    check_arguments(match_targets, locals())
    if weights not in (None, "gradient"):
        raise ValueError(f"weights={weights!r}: use None or 'gradient'.")
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes}: give a number of bytes, or None.")
    check_not_sharded(model)
    units = _without_kept(select_units(model, include, exclude))
    if not offset:
        _check_searched(units)
    # DDP would synchronise buffers at each forward pass, which ranks do in turns of their own.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    networks = TwoNetworks(inner, list(units.values()), as_batches(batches, inner))
    fit = OnePass(
        networks=networks,
        paths={unit: path for path, unit in units.items()},
        weights=weights,
        refit=refit,
        max_bytes=max_bytes,
        logits=logits,
        progress=progress,
        offset=offset,
    )
    before = {unit: _numbers(unit) for unit in units.values()}
    try:
        with prediction_mode(inner):
            rows = tuple(fit.run())
    except BaseException:
        for unit, numbers in before.items():
            _put_back(unit, numbers)
        raise
    for unit in units.values():
        if unit.fitted is not None:
            unit.fitted.offset = offset
    reasons = {p: fit.refitted[m] for p, m in model.named_modules() if m in fit.refitted}
    paths = tuple(path for path, reason in reasons.items() if reason is None)
    left = {path: reason for path, reason in reasons.items() if reason is not None}
    waiting = any(bool((unit.gate.predict() != 0).all()) for unit in units.values())
    report = MatchReport(
        rows,
        paths,
        left,
        needs_swap=bool(paths) and waiting,
        held=fit.held,
        again=len(networks.batches) - fit.waited,
    )
    warn_of_poor_fits(report)
    return report


def _check_searched(units: dict[str, GatedActivation]) -> None:
    """Raise ValueError where a target needs its offset."""
    for path, unit in units.items():
        if not isinstance(family_of(unit.target), Searched):
            raise ValueError(
                f"{path}: a fit of {unit.target} needs its offset. offset=False is for targets "
                "such as relu and hardswish; leave other sites out by include= or exclude=."
            )


def _without_kept(units: dict[str, GatedActivation]) -> dict[str, GatedActivation]:
    """Without sites that are at their source as a whole, if other sites have transferred gates."""
    z = {path: unit.gate.predict().detach() for path, unit in units.items()}
    if not any(bool((gates == 0).any()) for gates in z.values()):
        return units
    return {path: unit for path, unit in units.items() if not bool((z[path] == 1).all())}


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
