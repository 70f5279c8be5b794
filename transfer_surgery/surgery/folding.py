"""fold_targets: the numbers of fitted targets go into the layers around them, where it is exact.

``a * f(w*x + c) + b`` behind a layer with weight ``W`` and bias ``d`` is ``a * f(x) + b`` behind
one with ``w*W`` and ``w*d + c``; a layer that reads it can take ``a`` and, without padding, ``b``.
Where none reads it alone, a positive ``a`` of a ReLU goes into the layer before, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from transfer_surgery._messages import check_arguments
from transfer_surgery._running import call_model, explained, predict, prediction_mode, to_device_of
from transfer_surgery.sites import swap_children
from transfer_surgery.surgery.baked_modules import (
    IgnoringOperands,
    MixedActivation,
    Overwriting,
)
from transfer_surgery.surgery.checks import check_no_gates, check_no_offload
from transfer_surgery.surgery.fold_neighbours import Neighbours, find_neighbours
from transfer_surgery.surgery.fold_report import FoldReport, FoldRow
from transfer_surgery.surgery.fold_site import Changes, fold_site, left_at
from transfer_surgery.surgery.insertion import share_hooks
from transfer_surgery.units import FittedActivation


@torch.no_grad()
def fold_targets(model: nn.Module, example_input: Any) -> FoldReport:
    """Move the numbers of a baked model's fitted targets into neighbouring layers, in place.

    One run shows which layer writes a site's input and which one reads its output. Where nothing
    else reads the tensor between, ``w`` and ``c`` go into a linear layer, a convolution or the
    weights of a norm layer before, ``a`` and ``b`` into a linear layer or a convolution behind
    (``b`` not where zeros are padded). Where no layer behind can take it, a positive ``a`` goes
    into the layer before if ``a * f(x)`` is ``f(a * x)``, as for ReLU. A site that is called
    several times is folded if all calls have the same layer there, which has no others. Parameters
    stay the same objects with new values, so that an optimizer made before goes on training them; a
    layer without a bias gets one if it needs it. What cannot take a number is left alone, and the
    report says why: a parameter that is shared, read elsewhere, frozen, quantized, computed or
    hooked. The outputs in evaluation mode are the same to rounding; where they would not be, a site
    keeps its numbers.

    Args:
        model: a model after `transfer_surgery.bake`.
        example_input: a batch of its input: a tensor, a tuple of arguments or a dict of keyword
            arguments. A small batch is enough. All inputs must take the same path through the
            model as this one.

    Returns:
        A row per site that has a fitted target and no source any more, and the number of
        parameters before and after.

    Raises:
        ValueError: the model still has gates, its parameters are offloaded, or the batch has no
            tensors. After any error the model is unchanged.

    Examples:
        >>> from transfer_surgery import bake, convert, match_targets, swap_targets
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = match_targets(convert(model, "sin", example_input=x), [x])
        >>> print(fold_targets(bake(swap_targets(model)), x))
        path  w, c went to  a, b went to  left
        --------------------------------------
        1     0             2             -
        90 parameters before, 58 after
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ActivationModule(sin)
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    check_arguments(fold_targets, locals())
    check_no_gates(model)
    check_no_offload(model)
    batch = to_device_of(model, example_input)
    sites = _sites(model)
    count = sum(p.numel() for p in model.parameters())
    with prediction_mode(model):
        with explained(model, "the example input", batch):
            expected, needs_gradients = predict(model, batch)

        def run() -> Any:
            with torch.set_grad_enabled(needs_gradients):
                return call_model(model, batch)

        neighbours = find_neighbours(model, sites, run)

        def same() -> bool:
            return _same(run(), expected)

        rows = _fold_all(sites, neighbours, same)
    drop_folded_sites(model)
    return FoldReport(rows, count, sum(p.numel() for p in model.parameters()))


def drop_folded_sites(model: nn.Module) -> None:
    """Put the plain activation where a fitted target has no numbers of its own any more."""
    plain: dict[nn.Module, nn.Module] = {
        site: site.activation.train(site.training)
        for site in model.modules()
        if isinstance(site, FittedActivation)
        and not any(True for _ in site.parameters(recurse=False))
    }
    for site, module in plain.items():
        share_hooks(site, module)
    swap_children(model, plain)


def _sites(model: nn.Module) -> dict[str, FittedActivation]:
    """The fitted targets that are no part of a mixture, by the path of their site."""
    modules, found = dict(model.named_modules()), {}
    for path, module in modules.items():
        if isinstance(module, FittedActivation):
            around = path.rpartition(".")[0]
            if isinstance(modules.get(around), MixedActivation):
                continue
            wrapped = isinstance(modules.get(around), IgnoringOperands | Overwriting)
            found[around if wrapped else path] = module
    return found


def _fold_all(
    sites: dict[str, FittedActivation], near: dict[str, Neighbours], same: Callable[[], bool]
) -> tuple[FoldRow, ...]:
    """Fold all sites at once; one by one where that changes the outputs."""
    changes = Changes()
    try:
        rows = tuple(fold_site(changes, path, site, near[path]) for path, site in sites.items())
        if same():
            return rows
        changes.undo()
        rows = ()
        for path, site in sites.items():
            begin = len(changes.before)
            row = fold_site(changes, path, site, near[path])
            if not same():
                changes.undo(begin)
                reason = "(outputs would change)"
                row = FoldRow(path, reason, reason, left_at(site))
            rows = (*rows, row)
    except BaseException:
        changes.undo()
        raise
    return rows


def _same(found: Any, expected: Any) -> bool:
    """Whether every floating output is the same to rounding."""
    for now, before in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not (isinstance(before, Tensor) and before.is_floating_point() and before.numel()):
            continue
        finite = before.isfinite()
        if not torch.equal(finite, now.isfinite()):
            return False
        now, before = now[finite], before[finite]
        if not before.numel():
            continue
        error = ((now - before).abs().max() / before.abs().max().clamp_min(1e-30)).item()
        if not error <= (1e5 * torch.finfo(before.dtype).eps if before.dtype.itemsize > 2 else 0.1):
            return False
    return True
