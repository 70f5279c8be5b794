"""fold_targets: the numbers of fitted targets go into the layers around them, where it is exact.

``a * f(w*x + c) + b`` behind a layer with weight ``W`` and bias ``d`` is ``a * f(x) + b`` behind
one with ``w*W`` and ``w*d + c``; a layer that reads it can take ``a`` and, without padding, ``b``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from transfer_surgery._running import call_model, prediction_mode, to_device_of
from transfer_surgery._table import Column, Table
from transfer_surgery.surgery.baking import plain_activation
from transfer_surgery.surgery.checks import check_no_gates
from transfer_surgery.surgery.fold_neighbours import CONVOLUTIONS, Neighbours, find_neighbours
from transfer_surgery.surgery.insertion import share_hooks, swap_children
from transfer_surgery.units import FittedActivation


@dataclass(frozen=True)
class FoldRow:
    """One site.

    Args:
        path: of its module.
        before: the layer that took ``w`` and ``c``, or why none could.
        after: the layer that took ``a``, and maybe ``b``, or why none could.
        left: which of ``a``, ``w``, ``c`` and ``b`` the module still has.
    """

    path: str
    before: str
    after: str
    left: str


@dataclass(frozen=True, repr=False)
class FoldReport(Table[FoldRow]):
    """Which numbers moved to which layers: a table.

    Args:
        rows: a row per site.
        parameters_before: number of parameters of the whole model.
        parameters_after: the same after folding.
    """

    columns = (
        Column("path"),
        Column("before", "w, c went to"),
        Column("after", "a, b went to"),
        Column("left", text=lambda left: left or "-"),
    )
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        if not self.rows:
            return "no site has a fitted target alone: there is nothing to fold"
        return super().__str__()

    @property
    def notes(self) -> tuple[str, ...]:
        count = f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after"
        return (count,)


@torch.no_grad()
def fold_targets(model: nn.Module, example_input: Any) -> FoldReport:
    """Move the numbers of a baked model's fitted targets into neighbouring layers, in place.

    One run shows which layer writes a site's input and which one reads its output. Where nothing
    else reads the tensor between, ``w`` and ``c`` go into a linear layer, a convolution or the
    weights of a norm layer before, ``a`` and ``b`` into a linear layer or a convolution behind
    (``b`` not where zeros are padded). A layer without a bias gets one if it needs it. The outputs
    in evaluation mode are the same to rounding.

    Args:
        model: a model after `transfer_surgery.bake`.
        example_input: a batch of its input: a tensor, a tuple of arguments or a dict of keyword
            arguments. A small batch is enough. All inputs must take the same path through the
            model as this one.

    Returns:
        A row per site that has a fitted target and no source any more, and the number of
        parameters before and after.

    Raises:
        ValueError: the model still has gates, or the batch has no tensors.
        RuntimeError: the outputs are not the same to rounding. After any error the model is
            unchanged.

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
    sites = {p: m for p, m in model.named_modules() if isinstance(m, FittedActivation)}
    check_no_gates(model)
    batch = to_device_of(model, example_input)
    count = sum(p.numel() for p in model.parameters())
    changed = _Changes()
    with prediction_mode(model):
        expected = call_model(model, batch)
        neighbours = find_neighbours(model, sites, lambda: call_model(model, batch))
        try:
            rows = tuple(_fold(changed, p, site, neighbours[p]) for p, site in sites.items())
            _compare(call_model(model, batch), expected)
        except BaseException:
            changed.undo()
            raise
    plain: dict[nn.Module, nn.Module] = {
        site: plain_activation(site.activation, site.takes_operands).train(site.training)
        for site in sites.values()
        if not any(True for _ in site.parameters())
    }
    for site, module in plain.items():
        share_hooks(site, module)
    swap_children(model, plain)
    return FoldReport(rows, count, sum(p.numel() for p in model.parameters()))


class _Changes:
    """Parameters that were replaced, to be put back."""

    def __init__(self) -> None:
        self.before: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def write(self, module: Any, name: str, value: Tensor | None) -> None:
        """A new parameter like the old one; None: none."""
        old = module._parameters[name]
        self.before.append((module, name, old))
        if value is None:
            module._parameters[name] = None
            return
        like = module.weight if old is None else old
        value = value.to(like).reshape(value.shape if old is None else old.shape).contiguous()
        module._parameters[name] = nn.Parameter(value, requires_grad=like.requires_grad)

    def undo(self) -> None:
        for module, name, parameter in reversed(self.before):
            module._parameters[name] = parameter


def _fold(changes: _Changes, path: str, site: FittedActivation, near: Neighbours) -> FoldRow:
    """Fold one site; its numbers that have moved become None."""
    fitted = site.fitted
    # After an earlier fold some of the numbers are gone: what is left may not fit in either.
    if near.before is not None and fitted.w is not None:
        layer, w, c = near.before, _wide(fitted.w), _wide(fitted.c)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        ones = [1] * (layer.weight.dim() - 1)
        changes.write(layer, "bias", bias * w + c)
        changes.write(layer, "weight", layer.weight.double() * w.reshape(-1, *ones))
        changes.write(fitted, "w", None)
        changes.write(fitted, "c", None)
    if near.after is not None and fitted.a is not None and fitted.b is not None:
        _fold_behind(changes, site, near.after)
    left = [name for name in "awcb" if getattr(fitted, name) is not None]
    return FoldRow(path, near.before_name, near.after_name, ", ".join(left))


def _fold_behind(changes: _Changes, site: FittedActivation, layer: Any) -> None:
    fitted = site.fitted
    a, b = _wide(fitted.a), _wide(fitted.b)
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

    if not padded:
        bias = 0.0 if layer.bias is None else layer.bias.double()
        shift = (by_group * per_input_channel(b)).flatten(2).sum(2).flatten()
        changes.write(layer, "bias", bias + shift)
        changes.write(fitted, "b", None)
    elif bool((b == 0).all()):
        changes.write(fitted, "b", None)
    else:
        changes.write(fitted, "b", b / scale)
    changes.write(layer, "weight", (by_group * per_input_channel(scale)).flatten(0, 1))
    rest = a / scale if padded else torch.ones_like(a)
    whole = bool((rest == 1).all())
    changes.write(fitted, "a", None if whole else rest)


def _wide(parameter: nn.Parameter | None) -> Tensor:
    assert parameter is not None
    return parameter.detach().double().flatten()


def _is_padded(layer: Any) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding != "valid" and max(layer.kernel_size) > 1
    return any(layer.padding)


def _compare(found: Any, expected: Any) -> None:
    """RuntimeError where any floating output differs by more than rounding."""
    for now, before in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not (isinstance(before, Tensor) and before.is_floating_point() and before.numel()):
            continue
        largest = before.abs().max().clamp_min(1e-30)
        error = ((now - before).abs().max() / largest).item()
        allowed = 1e5 * torch.finfo(before.dtype).eps if before.dtype.itemsize > 2 else 0.1
        if not error <= allowed:
            raise RuntimeError(
                f"folding changed the outputs by {error:.1e} of the largest one, which is more "
                "than rounding; the model is as it was. If the batch has no NaN in it, please "
                "report this network."
            )
