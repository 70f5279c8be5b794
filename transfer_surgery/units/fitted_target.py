"""The parameters of a fitted target ``a * f(w*x + c) + b``, and what such a site is baked to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfer_surgery._float32 import Float32Module
from transfer_surgery._sharding import gathered
from transfer_surgery.activations import Activation
from transfer_surgery.units.granularity import Granularity
from transfer_surgery.units.kernels import Numbers, fitted_value


class TargetParameters(Float32Module):
    """Amplitude ``a``, frequency ``w``, phase ``c`` and offset ``b`` of a target, one per gate.

    Args:
        shape: of each: ``(1,)`` per layer, ``(C,)`` per channel, the feature shape per neuron.
        granularity: which elements of the input share them.

    They start at 1, 1, 0 and 0, the target as it is. One that `fold_targets` moved into a
    neighbouring layer is None.

    Examples:
        >>> from transfer_surgery import PerChannel
        >>> parameters = TargetParameters((3,), PerChannel(1))
        >>> [tuple(p.shape) for p in parameters.expand(torch.zeros(2, 3, 4, 4))]
        [(1, 3, 1, 1), (1, 3, 1, 1), (1, 3, 1, 1), (1, 3, 1, 1)]
    """

    a: nn.Parameter | None
    w: nn.Parameter | None
    c: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(self, shape: Sequence[int], granularity: Granularity) -> None:
        super().__init__()
        self.granularity = granularity
        for name, start in (("a", 1.0), ("w", 1.0), ("c", 0.0), ("b", 0.0)):
            value = torch.full(tuple(shape), start, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value))

    def whole(self) -> Numbers:
        """``(a, w, c, b)`` in float32, gathered where FSDP2 shards them; None: folded away."""
        a, w, c, b = (
            None if p is None else gathered(p).float() for p in (self.a, self.w, self.c, self.b)
        )
        return a, w, c, b

    def expand(self, x: Tensor) -> Numbers:
        """The same, viewed so that they broadcast to an input."""
        a, w, c, b = (None if p is None else self.granularity.expand(p, x) for p in self.whole())
        return a, w, c, b

    def forward(self, x: Tensor) -> Numbers:
        """The same; a call, so that hooks of the module see its parameters."""
        return self.expand(x)

    def extra_repr(self) -> str:
        scale, offset = "" if self.a is None else "a * ", "" if self.b is None else " + b"
        inner = ("x" if self.w is None else "w*x") + ("" if self.c is None else " + c")
        shapes = {tuple(p.shape) for p in self.parameters()}
        return f"{scale}f({inner}){offset}, shape={', '.join(map(str, shapes))}"


class FittedActivation(nn.Module):
    """``a * f(w*x + c) + b`` as a plain module; its parameters can be trained further.

    Args:
        activation: ``f``.
        parameters: ``a``, ``w``, ``c`` and ``b``.
        takes_operands: whether the site passes tensors that the source took; ``f`` needs none.

    Examples:
        >>> from transfer_surgery import PerLayer, get_activation
        >>> parameters = TargetParameters((1,), PerLayer())
        >>> FittedActivation(get_activation("relu"), parameters)(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """

    def __init__(
        self, activation: Activation, parameters: TargetParameters, takes_operands: bool = False
    ) -> None:
        super().__init__()
        self.activation, self.fitted = activation, parameters
        self.takes_operands = takes_operands

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        return fitted_value(input, self.activation, self.fitted(input))

    def extra_repr(self) -> str:
        return str(self.activation)
