"""The numbers of one fitted target go into the layers around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._tensors import overwrite
from transfer_surgery.surgery.fold_neighbours import CONVOLUTIONS, Neighbours
from transfer_surgery.surgery.fold_report import FoldRow
from transfer_surgery.units import FittedActivation


class Changes:
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
            overwrite(old, value.reshape(old.shape))
        else:
            module._parameters[name] = nn.Parameter(value.to(module.weight))
        return old is None

    def undo(self, begin: int = 0) -> None:
        """Put back what was changed from the given place on."""
        for module, name, parameter, value in reversed(self.before[begin:]):
            if parameter is not None and value is not None:
                overwrite(parameter, value)
            module._parameters[name] = parameter
        del self.before[begin:]


def fold_site(changes: Changes, path: str, site: FittedActivation, near: Neighbours) -> FoldRow:
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
    return FoldRow(path, near.before_name, near.after_name, left_at(site), ", ".join(added))


def _drop_neutral(changes: Changes, site: FittedActivation) -> None:
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
    x = x.reshape(-1, *[1] * (site.a.dim() + site.trailing))  # coefficients are one per gate
    y = site.activation(x.clone())
    # Powers of two are exact in every dtype.
    return all(torch.equal(site.activation(k * x), k * y) for k in (0.25, 2.0, 8.0))


def left_at(site: FittedActivation) -> str:
    """The numbers that a site still has."""
    return ", ".join(name for name in "awcb" if getattr(site, name) is not None)


def _write_bias(changes: Changes, layer: Any, factor: Tensor | float, shift: Tensor) -> bool:
    """``factor * bias + shift``; return whether the layer had none before."""
    if layer.bias is not None:
        shift = layer.bias.double() * factor + shift
    elif not shift.any():
        return False
    else:
        shift = shift.expand(layer.weight.shape[0]).contiguous()
    return changes.write(layer, "bias", shift)


def _fold_behind(changes: Changes, site: FittedActivation, layer: Any) -> bool:
    """Move ``a`` and ``b`` into the layer behind; return whether it has a bias only now."""
    a, b = _wide(site.a), _wide(site.b)
    padded = isinstance(layer, CONVOLUTIONS) and _is_padded(layer)
    # A gate whose amplitude is next to nothing computes a constant: b / a would be huge.
    # Without an offset it may be 0, too, as that of a gate that does nothing.
    scale = torch.where((a.abs() > 1e-3 * b.abs()) | (b == 0), a, 1.0) if padded else a
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
    stays = torch.where(b == 0, b, b / scale)
    changes.write(site, "b", stays if padded and b.any() else None)
    changes.write(layer, "weight", (by_group * per_input_channel(scale)).flatten(0, 1))
    rest = torch.where(scale == a, 1.0, a)
    changes.write(site, "a", None if bool((rest == 1).all()) else rest)
    return added


def _wide(parameter: nn.Parameter | None) -> Tensor:
    assert parameter is not None
    return parameter.detach().double().flatten()


def _is_padded(layer: Any) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding != "valid" and max(layer.kernel_size) > 1
    return any(layer.padding)
