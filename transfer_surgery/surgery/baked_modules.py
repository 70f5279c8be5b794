"""What stands at the sites of a baked network: modules as plain as torch's own.

They are tensor code without decisions on shapes or values and hold their own parameters, so that
whatever traces, scripts, hooks, offloads or exports a network takes them as it takes torch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transfer_surgery.units import Float32Module, align


class MixedActivation(Float32Module):
    """Source where the fixed mask ``z`` is 1, target where it is 0, Eq. 1 between.

    Args:
        source: the activation where ``z`` is 1, a module.
        target: the activation where ``z`` is 0, a module.
        z: gates in [0, 1], float32.
        trailing: how many axes they lack behind, see `Granularity.trailing`.
    """

    if TYPE_CHECKING:  # torch.jit.script would read it, and does not know the text
        z: Tensor

    def __init__(self, source: nn.Module, target: nn.Module, z: Tensor, trailing: int) -> None:
        super().__init__()
        self.source, self.target, self.trailing = source, target, trailing
        self.guards_source = not has_finite_slopes(source)
        self.guards_target = not has_finite_slopes(getattr(target, "activation", target))
        self.register_buffer("z", z)

    def forward(self, input: Tensor) -> Tensor:
        z = align(self.z, self.trailing)
        # Where a branch counts for nothing its gradient is 0, and 0 * inf would be nan.
        s = self.source(torch.where(z == 0, 0.0, input) if self.guards_source else input)
        t = self.target(torch.where(z == 1, 0.0, input) if self.guards_target else input)
        return _selected(s, t, z)

    def extra_repr(self) -> str:
        return f"{float(self.z.mean()):.0%} source"


class MixedOfOperands(MixedActivation):
    """The same where the source takes further tensors, such as PReLU's slope."""

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        z = align(self.z, self.trailing)
        s = self.source(torch.where(z == 0, 0.0, input), *operands)
        t = self.target(torch.where(z == 1, 0.0, input) if self.guards_target else input)
        return _selected(s, t, z)


def _selected(s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    # Float32 gates make the sum float32 at least.
    mixed = (z * s + (1 - z) * t).to(s.dtype)
    return torch.where(z == 1, s, torch.where(z == 0, t, mixed))


def has_finite_slopes(activation: nn.Module) -> bool:
    """Whether the derivative is finite at whatever finite input, as that of ``log`` is not.

    Examples:
        >>> from transfer_surgery.activations import ActivationModule
        >>> has_finite_slopes(nn.GELU()), has_finite_slopes(ActivationModule("square"))
        (True, True)
    """
    with torch.inference_mode(False), torch.enable_grad():
        half = torch.logspace(-30, 30, 121)
        x = torch.cat((-half, torch.zeros(1), half)).requires_grad_()
        try:
            y = activation(x)
        except (TypeError, RuntimeError):  # it takes further tensors, or has numbers per channel
            return False
        if not y.requires_grad:  # a comparison: constant wherever it has a derivative
            return True
        (slope,) = torch.autograd.grad(y.sum(), x)
    return bool(slope.isfinite().all())


class IgnoringOperands(nn.Module):
    """An activation at a site that passes tensors which its source took."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        result: Tensor = self.activation(input)
        return result


class Overwriting(nn.Module):
    """Writes an activation's result back to its input, as the original in-place call did."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return input.copy_(self.activation(_copied(input)))


class OverwritingOfOperands(Overwriting):
    """The same at a site that passes further tensors."""

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        return input.copy_(self.activation(_copied(input), *operands))


def _copied(x: Tensor) -> Tensor:
    # As `copy_with_strides` of the unit, without a decision that no tracer could follow: what is
    # overwritten is not expanded.
    return x.new_empty_strided(x.size(), x.stride()).copy_(x)
