"""The parameters of a fitted target ``a * f(w*x + c) + b``, and what such a site is baked to.

That of a polynomial has coefficients for each gate: ``f(v) = k1*v + k2*v**2 + ...``, where ``v`` is
between -1 and 1 for the inputs that `match_targets` fitted it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfer_surgery._sharding import gathered
from transfer_surgery.activations import start_coefficients
from transfer_surgery.units.float32 import Float32Module
from transfer_surgery.units.gates import check_no_sample_gradients
from transfer_surgery.units.granularity import Granularity, align
from transfer_surgery.units.kernels import Numbers


class TargetParameters(Float32Module):
    """Amplitude ``a``, frequency ``w``, phase ``c`` and offset ``b`` of a target, one per gate.

    Args:
        shape: of each: ``(1,)`` per layer, ``(C,)`` per channel, the feature shape per neuron.
        granularity: which elements of the input share them.
        degree: of a polynomial, whose coefficients are ``k``, of the shape ``(degree, *shape)``; 0:
            the target is none.

    They start at 1, 1, 0 and 0, the target as it is. Those of a polynomial but ``w`` and ``c``, its
    range, are trained.

    Examples:
        >>> from transfer_surgery import PerChannel
        >>> parameters = TargetParameters((3,), PerChannel(1))
        >>> [tuple(p.shape) for p in parameters.expand(torch.zeros(2, 3, 4, 4))]
        [(3, 1, 1), (3, 1, 1), (3, 1, 1), (3, 1, 1)]
    """

    a: nn.Parameter
    w: nn.Parameter
    c: nn.Parameter
    b: nn.Parameter
    k: nn.Parameter | None

    def __init__(self, shape: Sequence[int], granularity: Granularity, degree: int = 0) -> None:
        super().__init__()
        self.granularity = granularity
        for name, start in (("a", 1.0), ("w", 1.0), ("c", 0.0), ("b", 0.0)):
            value = torch.full(tuple(shape), start, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value))
        self.register_parameter("k", None)
        if degree:
            starts = start_coefficients(degree)
            self.k = nn.Parameter(torch.stack([torch.full(tuple(shape), k) for k in starts]))
            # The range of the fit stays: w and c would only say in other words what k says.
            self.w.requires_grad_(False)
            self.c.requires_grad_(False)

    @property
    def offset(self) -> bool:
        """Whether ``b`` is trained as the others are; else it stays where it is."""
        return self.b.requires_grad or not self.a.requires_grad

    @offset.setter
    def offset(self, wanted: bool) -> None:
        self.b.requires_grad_(wanted and self.a.requires_grad)

    def whole(self) -> Numbers:
        """``(a, w, c, b, *k)`` in float32, gathered where FSDP2 shards them.

        The range ``w`` and ``c`` of a polynomial has no gradient.
        """
        a, w, c, b = (gathered(p).float() for p in (self.a, self.w, self.c, self.b))
        if self.k is None:
            return a, w, c, b
        # Detached, since model.requires_grad_(True) would otherwise train the range.
        return a, w.detach(), c.detach(), b, *gathered(self.k).float().unbind()

    def expand(self, x: Tensor) -> Numbers:
        """The same, viewed so that they broadcast to an input."""
        return tuple(self.granularity.expand(p, x) for p in self.whole())

    def forward(self, x: Tensor) -> Numbers:
        """The same; a call, so that hooks of the module see its parameters."""
        check_no_sample_gradients(self.a)
        # Copies: FSDP 1 frees the memory of a module's parameters when its call has ended.
        return tuple(number.clone() for number in self.expand(x))

    def extra_repr(self) -> str:
        return _formula(self)


class Polynomial(Float32Module):
    """``k1*v + k2*v**2 + ...`` as a plain module.

    Args:
        k: coefficients ``(degree, *shape of the gates)``, which become a parameter of this module.
        trailing: how many axes they lack behind, see `Granularity.trailing`.

    Examples:
        >>> Polynomial(nn.Parameter(torch.tensor([[1.0], [10.0]])), 0)(torch.tensor([1.0, 2.0]))
        tensor([11., 42.], grad_fn=<MulBackward0>)
    """

    def __init__(self, k: nn.Parameter, trailing: int) -> None:
        super().__init__()
        self.k, self.trailing, self.degree = k, trailing, len(k)

    def forward(self, input: Tensor) -> Tensor:
        y = input * align(self.k[self.degree - 1], self.trailing)
        for power in range(self.degree - 2, -1, -1):
            y = (y + align(self.k[power], self.trailing)) * input
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        return f"degree={self.degree}, shape={tuple(self.k.shape[1:])}"


class FittedActivation(Float32Module):
    """``a * f(w*x + c) + b`` as a plain module; its parameters can be trained further.

    Args:
        activation: ``f``, a module; for a polynomial, `parameters` has its coefficients instead.
        parameters: whose ``a``, ``w``, ``c`` and ``b`` become parameters of this module.
        dims: number of dimensions of its input.

    One that `fold_targets` moved into a neighbouring layer is None.

    Examples:
        >>> from transfer_surgery import PerLayer
        >>> parameters = TargetParameters((1,), PerLayer())
        >>> FittedActivation(nn.ReLU(), parameters, 1)(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    if TYPE_CHECKING:  # torch.jit.script would read these and take less
        a: nn.Parameter | None
        w: nn.Parameter | None
        c: nn.Parameter | None
        b: nn.Parameter | None

    def __init__(self, activation: nn.Module, parameters: TargetParameters, dims: int) -> None:
        super().__init__()
        self.granularity = parameters.granularity
        self.trailing = self.granularity.trailing(dims)
        k = parameters.k
        self.activation = activation if k is None else Polynomial(k, self.trailing)
        for name in "awcb":
            self.register_parameter(name, getattr(parameters, name))
        if k is not None:  # model.requires_grad_(True) has meant what is trained
            parameters.w.requires_grad_(False)
            parameters.c.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        # Float32 numbers make the arithmetic float32; the result is what the network expects.
        y = input if self.w is None else input * align(self.w, self.trailing)
        y = y if self.c is None else y + align(self.c, self.trailing)
        y = self.activation(y)
        y = y if self.a is None else y * align(self.a, self.trailing)
        y = y if self.b is None else y + align(self.b, self.trailing)
        result: Tensor = y.to(input.dtype)
        return result

    def extra_repr(self) -> str:
        return _formula(self)


def _formula(numbers: Any) -> str:
    """Which of the numbers there are, such as ``a * f(x) + b``."""
    scale, offset = "" if numbers.a is None else "a * ", "" if numbers.b is None else " + b"
    inner = ("x" if numbers.w is None else "w*x") + ("" if numbers.c is None else " + c")
    shapes = {tuple(p.shape) for p in (numbers.a, numbers.w, numbers.c, numbers.b) if p is not None}
    return f"{scale}f({inner}){offset}, shape={', '.join(map(str, shapes))}"
