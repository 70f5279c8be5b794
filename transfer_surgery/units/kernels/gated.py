"""The gated activation as a unit runs it: exact short cuts at the ends, the formula in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.units.kernels.engine import Formula, gradients_of
from transfer_surgery.units.kernels.formula import (
    Numbers,
    fitted_value,
    gated_value,
    straight_through_value,
)
from transfer_surgery.units.kernels.recomputed import is_transformed, recomputed, values_readable


def gated(
    x: Tensor,
    z: Tensor,
    source: Activation,
    target: Activation,
    *,
    straight_through: bool = False,
    operands: tuple[Tensor, ...] = (),
    numbers: Numbers | None = None,
    bounded: bool = False,
    in_place: bool = False,
) -> Tensor:
    """The gated activation of Eq. 1; autograd keeps its inputs alone.

    Args:
        x: input, any shape.
        z: gates in [0, 1], float32, of a shape that broadcasts to that of ``x``.
        source: activation where ``z`` is 1.
        target: activation where ``z`` is 0.
        straight_through: whether exact gates need a gradient too (Bernoulli gates).
        operands: further tensors that the source takes, such as a learned slope.
        numbers: those of the target ``a * target(w*x + c) + b``; None: as it is.
        bounded: as in `fitted_value`.
        in_place: nobody else reads ``x``: while all gates are 1 its memory may hold the result.

    Returns:
        A tensor of the shape of ``x`` and the dtype of ``source(x)``.

    Examples:
        >>> x = torch.tensor([-1.0, -1.0, -1.0])
        >>> gated(
        ...     x, torch.tensor([1.0, 0.5, 0.0]), get_activation("relu"), get_activation("square")
        ... )
        tensor([0.0000, 0.5000, 1.0000])
    """
    fitted = numbers or ()
    formula = _GatedFormula(source, target, straight_through, len(operands), bounded)
    if is_transformed(x, z, *operands, *fitted):
        return formula.plain(x, z, *operands, *fitted)
    if z.device.type == "cpu" and z.numel():  # elsewhere a look at the gates has to wait for them
        low, high = (end.item() for end in z.detach().aminmax())
        exact = not (z.requires_grad and straight_through)
        if exact and low == 1:
            if in_place and source in _IN_PLACE and x.grad_fn is not None and not x._is_view():
                return _IN_PLACE[source](_with_zero_gradient_in_place(x, z, *fitted))
            return source(_with_zero_gradient(x, z, *fitted), *operands)
        if exact and high == 0 and not operands:  # those keep their gradient, which is 0
            x = _with_zero_gradient(x, z)
            return recomputed(_FittedFormula(target, bounded), x, *fitted) if fitted else target(x)
    return recomputed(formula, x, z, *operands, *fitted)


@dataclass(frozen=True)
class _GatedFormula(Formula):
    """Eq. 1 of tensors in a row: input, gates, operands, and the numbers of a fitted target."""

    source: Activation
    target: Activation
    straight_through: bool
    operands: int
    bounded: bool

    def __str__(self) -> str:
        return f"the unit {self.source} -> {self.target}"

    def plain(self, *tensors: Tensor) -> Tensor:
        formula = straight_through_value if self.straight_through else gated_value
        return formula(**self._arguments(tensors))

    def blended(self, *tensors: Tensor) -> Tensor:
        """The same as long as all values are finite, in fewer passes over memory."""
        return gated_value(**self._arguments(tensors), select=False)

    def _arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        x, z, *others = tensors
        return {
            "x": x,
            "z": z,
            "source": self.source,
            "target": self.target,
            "operands": tuple(others[: self.operands]),
            "numbers": tuple(others[self.operands :]) or None,
            "bounded": self.bounded,
        }

    def value(self, *tensors: Tensor) -> Tensor:
        (y,) = self._finite_or_selected(lambda function: (function(*tensors),), tensors[0])
        return y

    def gradients(
        self, needed: tuple[bool, ...], grad: Tensor, *tensors: Tensor
    ) -> Sequence[Tensor]:
        found = list(
            self._finite_or_selected(
                lambda function: gradients_of(function, needed, grad, *tensors), tensors[0], grad
            )
        )
        if needed[1] and not self.straight_through:  # blending gives exact gates a gradient, too
            z, place = tensors[1], int(needed[0])
            found[place] = torch.where((z == 0) | (z == 1), 0.0, found[place])
        return found

    def _finite_or_selected(
        self, compute: Callable[[Callable[..., Tensor]], Sequence[Tensor]], *given: Tensor
    ) -> Sequence[Tensor]:
        if all(values_readable(tensor) for tensor in given):
            found = compute(self.blended)
            if all(result.sum(dtype=torch.float64).isfinite() for result in found):
                return found
        return compute(self.plain)


@dataclass(frozen=True)
class _FittedFormula(Formula):
    """A fitted target alone: input and numbers."""

    target: Activation
    bounded: bool

    def __str__(self) -> str:
        return f"the fitted target {self.target}"

    def plain(self, *tensors: Tensor) -> Tensor:
        x, *numbers = tensors
        return fitted_value(x, self.target, tuple(numbers), self.bounded)


def _with_zero_gradient(x: Tensor, *others: Tensor) -> Tensor:
    """``x``, through which others get the gradient 0 (not None: all parameters take part).

    Done to the input, since the result is a view, and networks change activations in place.
    """
    if not (torch.is_grad_enabled() and any(other.requires_grad for other in others)):
        return x
    result: Tensor = _ZeroGradient.apply(x, *others)
    return result


def _with_zero_gradient_in_place(x: Tensor, *others: Tensor) -> Tensor:
    """The same, with a result that is not a view: it can be overwritten."""
    others = tuple(other for other in others if other.requires_grad)
    result: Tensor = _ZeroGradientInPlace.apply(x, *others) if others else x
    return result


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.likes = [(other.shape, other.dtype) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        zeros = (torch.zeros(s, dtype=d, device=grad.device) for s, d in ctx.likes)
        return grad, *zeros


class _ZeroGradientInPlace(_ZeroGradient):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.likes = [(other.shape, other.dtype) for other in others]
        return x


# Those whose gradient comes from the result: nothing else is kept for backward.
_IN_PLACE: dict[Activation, Callable[[Tensor], Tensor]] = {
    get_activation("relu"): torch.relu_,
    get_activation("relu6"): partial(torch.nn.functional.hardtanh_, min_val=0.0, max_val=6.0),
}
