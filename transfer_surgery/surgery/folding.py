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

from transfer_surgery._arguments import check_arguments
from transfer_surgery._running import call_model, prediction_mode, to_device_of
from transfer_surgery.surgery.baked_modules import (
    IgnoringOperands,
    MixedActivation,
    Overwriting,
)
from transfer_surgery.surgery.checks import check_no_gates, check_no_offload
from transfer_surgery.surgery.fold_neighbours import CONVOLUTIONS, Neighbours, find_neighbours
from transfer_surgery.surgery.fold_report import FoldReport, FoldRow
from transfer_surgery.surgery.insertion import share_hooks, swap_children
from transfer_surgery.units import FittedActivation


@torch.no_grad()
def fold_targets(model: nn.Module, example_input: Any) -> FoldReport:
    """Move the numbers of a baked model's fitted targets into neighbouring layers, in place.

    One run shows which layer writes a site's input and which one reads its output. Where nothing
    else reads the tensor between, ``w`` and ``c`` go into a linear layer, a convolution or the
    weights of a norm layer before, ``a`` and ``b`` into a linear layer or a convolution behind
    (``b`` not where zeros are padded). Where no layer behind can take it, a positive ``a`` goes
    into the layer before if ``a * f(x)`` is ``f(a * x)``, as for ReLU. Parameters stay the same
    objects with new values, so that an optimizer made before goes on training them; a layer without
    a bias gets one if it needs it. What cannot take a number is left alone, and the report says
    why: a parameter that is shared, read elsewhere, frozen, quantized, computed or hooked. The
    outputs in evaluation mode are the same to rounding; where they would not be, a site keeps its
    numbers.

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
        expected = call_model(model, batch)
        neighbours = find_neighbours(model, sites, lambda: call_model(model, batch))

        def same() -> bool:
            return _same(call_model(model, batch), expected)

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
    changes = _Changes()
    try:
        rows = tuple(_fold(changes, path, site, near[path]) for path, site in sites.items())
        if same():
            return rows
        changes.undo()
        rows = ()
        for path, site in sites.items():
            begin = len(changes.before)
            row = _fold(changes, path, site, near[path])
            if not same():
                changes.undo(begin)
                reason = "(outputs would change)"
                row = FoldRow(path, reason, reason, _left(site))
            rows = (*rows, row)
    except BaseException:
        changes.undo()
        raise
    return rows


class _Changes:
    """What parameters were before, to be put back."""

    def __init__(self) -> None:
        self.before: list[tuple[nn.Module, str, nn.Parameter | None, Tensor | None]] = []

    def write(self, module: Any, name: str, value: Tensor | None) -> bool:
        """Give a parameter new values, or take it away; return whether the module had none."""
        old = module._parameters[name]
        self.before.append((module, name, old, None if old is None else old.detach().clone()))
        if value is None:
            module._parameters[name] = None
        elif old is not None:
            old.copy_(value.reshape(old.shape))
        else:
            module._parameters[name] = nn.Parameter(value.to(module.weight))
        return old is None

    def undo(self, begin: int = 0) -> None:
        """Put back what was changed from the given place on."""
        for module, name, parameter, value in reversed(self.before[begin:]):
            if parameter is not None and value is not None:
                parameter.copy_(value)
            module._parameters[name] = parameter
        del self.before[begin:]


def _fold(changes: _Changes, path: str, site: FittedActivation, near: Neighbours) -> FoldRow:
    """Fold one site; its numbers that have moved become None."""
    added = []
    # After an earlier fold some of the numbers are gone: what is left may not fit in either.
    if near.before is not None and site.w is not None and site.c is not None:
        layer, w, c = near.before, _wide(site.w), _wide(site.c)
        if near.after is None and _can_go_in_front(site):
            w, c = w * _wide(site.a), c * _wide(site.a)
            changes.write(site, "a", None)
        if _write_bias(changes, layer, w, c):
            added.append(f"{near.before_name}.bias")
        ones = [1] * (layer.weight.dim() - 1)
        changes.write(layer, "weight", layer.weight.double() * w.reshape(-1, *ones))
        changes.write(site, "w", None)
        changes.write(site, "c", None)
    can_move = near.after is not None and site.a is not None and site.b is not None
    if can_move and _fold_behind(changes, site, near.after):
        added.append(f"{near.after_name}.bias")
    _drop_neutral(changes, site)
    return FoldRow(path, near.before_name, near.after_name, _left(site), ", ".join(added))


def _drop_neutral(changes: _Changes, site: FittedActivation) -> None:
    """Take away amplitudes that are all 1 and offsets that are all 0."""
    for name, value in (("a", 1.0), ("b", 0.0)):
        parameter = getattr(site, name)
        if parameter is not None and bool((parameter == value).all()):
            changes.write(site, name, None)


def _can_go_in_front(site: FittedActivation) -> bool:
    """Whether ``a * f(x)`` is ``f(a * x)``, as for ReLU and amplitudes that are not negative."""
    if site.a is None or not bool((site.a >= 0).all()):
        return False
    x = torch.tensor([-1e3, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 1e3]).to(site.a)
    y = site.activation(x.clone())
    # Powers of two are exact in every dtype.
    return all(torch.equal(site.activation(k * x), k * y) for k in (0.25, 2.0, 8.0))


def _left(site: FittedActivation) -> str:
    return ", ".join(name for name in "awcb" if getattr(site, name) is not None)


def _write_bias(changes: _Changes, layer: Any, factor: Tensor | float, shift: Tensor) -> bool:
    """``factor * bias + shift``; return whether the layer had none before."""
    if layer.bias is not None:
        shift = layer.bias.double() * factor + shift
    elif not shift.any():
        return False
    else:
        shift = shift.expand(layer.weight.shape[0]).contiguous()
    return changes.write(layer, "bias", shift)


def _fold_behind(changes: _Changes, site: FittedActivation, layer: Any) -> bool:
    """Move ``a`` and ``b`` into the layer behind; return whether it has a bias only now."""
    a, b = _wide(site.a), _wide(site.b)
    padded = isinstance(layer, CONVOLUTIONS) and _is_padded(layer)
    # A gate whose amplitude is next to nothing computes a constant: b / a would be huge.
    scale = torch.where(a.abs() > 1e-3 * b.abs(), a, 1.0) if padded else a
    weight = layer.weight.double()
    groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    by_group = weight.unflatten(0, (groups, -1))
    ones = [1] * (weight.dim() - 2)

    def per_input_channel(values: Tensor) -> Tensor:
        """One per input channel, as ``(groups, 1, channels of a group, 1, ...)``."""
        values = values.expand(groups * weight.shape[1])
        return values.reshape(groups, 1, -1, *ones)

    added = False
    if not padded:
        shift = (by_group * per_input_channel(b)).flatten(2).sum(2).flatten()
        added = _write_bias(changes, layer, 1.0, shift)
    changes.write(site, "b", None if not padded or not b.any() else b / scale)
    changes.write(layer, "weight", (by_group * per_input_channel(scale)).flatten(0, 1))
    rest = a / scale if padded else torch.ones_like(a)
    changes.write(site, "a", None if bool((rest == 1).all()) else rest)
    return added


def _wide(parameter: nn.Parameter | None) -> Tensor:
    assert parameter is not None
    return parameter.detach().double().flatten()


def _is_padded(layer: Any) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding != "valid" and max(layer.kernel_size) > 1
    return any(layer.padding)


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
