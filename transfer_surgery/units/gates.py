"""Gates: the random variables ``z`` that choose between source (1) and target (0), section 3.3.

A gate module holds one number per gate and answers three questions: a sample for training, the
value for prediction, and ``P(z != 0)`` for the structural risk. `hard_concrete` is the paper's
proposal; `bernoulli`, `line` and `copy` are the baselines of section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._float32 import Float32Module
from transfer_surgery._sharding import whole
from transfer_surgery.units.hard_concrete import hard_concrete
from transfer_surgery.units.kernels.pieces import may_look

GateShape = tuple[int, ...]
Ingredients = tuple[Tensor, Tensor | None, tuple[float, float, float] | None]
"""``log_alpha``, noise and ``(temperature, xi, zeta)`` of Eq. 15; or ``z``, None and None."""

# With eps in [2**-25, 1 - 2**-24] no draw moves a gate that is this far out: see `_noise`.
_CERTAIN = 19.0

_REGISTRY: dict[str, type[Gate]] = {}


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Register a `Gate` subclass under the name used in ``convert(gate=name)``; a class decorator.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"gate {name!r} is already registered; choose another name.")

    def decorate(cls: type[Gate]) -> type[Gate]:
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return decorate


def registered_gates() -> tuple[str, ...]:
    """Names of all registered gates, sorted."""
    return tuple(sorted(_REGISTRY))


def gate_class(name: str) -> type[Gate]:
    """A registered gate.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown gate {name!r}. Known: {', '.join(registered_gates())}. "
            "Add your own with @register_gate(name)."
        )
    return _REGISTRY[name]


def make_gate(name: str, shape: GateShape, **options: Any) -> Gate:
    """Build a registered gate.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    return gate_class(name)(shape, **options)


def probability_of(logit: Tensor) -> Tensor:
    """``sigmoid(s)`` with an exact gradient.

    It is sigmoid(s) * sigmoid(-s) at any s; that of torch.sigmoid is q * (1 - q) of the rounded q:
    off by 1e-3 at log_alpha = 8 in float32, and exactly 0 above 15.
    """
    return F.logsigmoid(logit).exp()


class Gate(Float32Module):
    """Base class of gates.

    Args:
        shape: shape of the gates of one call site: ``(1,)`` per layer (FSDP2 takes no scalars),
            ``(C,)`` per channel, the feature shape per neuron.
        init: ``"log_alpha"``: ``log_alpha ~ N(8, 1)``, a converted network is unchanged;
            ``"alpha"``: ``alpha ~ N(8, 1)``, the paper's wording, for training from scratch.
        noise: ``"batch"``: one draw per gate and forward; ``"example"``: one per gate and example;
            ``"none"``: no sampling, training uses the prediction of Eq. 16 too.
        spread: standard deviation of the initial ``log_alpha``. Above 1 their mean is
            ``8 * spread``, so that no gate starts below 1; with a transfer schedule, the wider the
            spread, the fewer gates are between 0 and 1 at the same time.
        temperature: ``beta`` of Eq. 10, in (0, 1).
        stretch: ``(xi, zeta)`` of Eq. 12, ``xi < 0`` and ``zeta > 1``.
        generator: source of the initial values; the global random state stays untouched.

    Raises:
        ValueError: an argument is out of its range.
    """

    name = "gate"
    learned = True
    """Whether the gate has a ``log_alpha``; otherwise `progress` is set by the schedule."""
    straight_through = False
    """Whether the gradient with respect to ``z`` counts where ``z`` is exactly 0 or 1."""

    log_alpha: nn.Parameter
    progress: Tensor

    def __init__(
        self,
        shape: GateShape,
        *,
        init: str = "log_alpha",
        noise: str = "batch",
        spread: float = 1.0,
        temperature: float = 2 / 3,
        stretch: tuple[float, float] = (-0.1, 1.1),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if init not in ("log_alpha", "alpha"):
            raise ValueError(f"init={init!r}: use 'log_alpha' (keeps outputs) or 'alpha'.")
        if noise not in ("batch", "example", "none"):
            raise ValueError(f"noise={noise!r}: use 'batch', 'example' or 'none'.")
        if not (0 <= spread < math.inf):
            raise ValueError(f"spread={spread}: a standard deviation, give a number from 0 on.")
        if spread != 1 and init == "alpha":
            raise ValueError("spread is that of log_alpha; leave it out with init='alpha'.")
        if not 0 < temperature < 1:
            raise ValueError(f"temperature={temperature}: it must lie between 0 and 1 (Eq. 10).")
        if not (stretch[0] < 0 and stretch[1] > 1):
            raise ValueError(f"stretch={stretch}: needs xi < 0 and zeta > 1 (Eq. 12).")
        self.shape, self.noise = tuple(shape), noise
        self.temperature, self.stretch = temperature, (stretch[0], stretch[1])
        if self.learned:
            # Float32 on the generator's device, whatever torch's defaults are.
            place = None if generator is None else generator.device
            start = torch.randn(self.shape, generator=generator, dtype=torch.float32, device=place)
            start = start * spread + 8.0 * max(1.0, spread)
            if init == "alpha":
                start = start.clamp_min(1e-3).log()
            self.log_alpha = nn.Parameter(start)
        else:
            self.register_buffer("progress", torch.zeros((), dtype=torch.float32))

    @property
    def count(self) -> int:
        """Number of gates."""
        return math.prod(self.shape)

    def sample(self, batch: int) -> Tensor:
        """Training value of ``z``: ``shape``, or ``(batch, *shape)`` with noise per example."""
        raise NotImplementedError

    def ingredients(self, batch: int) -> Ingredients:
        """What a fused kernel makes a `sample` of."""
        return self.sample(batch), None, None

    def predict(self) -> Tensor:
        """Prediction value of ``z``, of the gates' shape, float32."""
        raise NotImplementedError

    def location(self) -> Tensor:
        """``log_alpha`` in float32 and whole, where FSDP2 shards it or its policy casts it."""
        return whole(self.log_alpha).float()

    def logit(self) -> Tensor:
        """``s`` with ``P(z != 0) = sigmoid(s)``: ``log_alpha`` plus a constant, per gate.

        The transfer schedule relies on that form: a number added to ``log_alpha`` adds to ``s``.
        """
        return self.location()

    def probability(self) -> Tensor:
        """``P(z != 0)`` per gate, of the gates' shape, differentiable where `learned`."""
        return probability_of(self.logit())

    def _noise(self, batch: int) -> Tensor:
        """``eps ~ U(0, 1)`` of Eq. 15, never exactly 0 or 1.

        No random number is drawn where none can matter (every ``|log_alpha|`` beyond 19, seen on
        CPU only, where looking costs no synchronisation): a network whose gates are all at 1 then
        trains with the random stream, hence the dropout masks, of the original.
        """
        shape = (batch, *self.shape) if self.noise == "example" else self.shape
        like: dict[str, Any] = {"dtype": torch.float32, "device": self.log_alpha.device}
        if self.noise == "none":
            return torch.full(shape, 0.5, **like)
        if may_look(self.log_alpha) and self.log_alpha.detach().abs().min().item() >= _CERTAIN:
            return torch.full(shape, 0.5, **like)
        return torch.rand(shape, **like).clamp(2.0**-25, 1 - 2.0**-24)

    def extra_repr(self) -> str:
        return f"{self.name}, shape={self.shape}"


@register_gate("hard_concrete")
class HardConcreteGate(Gate):
    """Rectified binary concrete gate, Eq. 10-16 (Louizos et al. 2018).

    Examples:
        >>> gate = HardConcreteGate((3,))
        >>> gate.predict()
        tensor([1., 1., 1.], grad_fn=<ClampBackward1>)
    """

    def sample(self, batch: int) -> Tensor:
        if self.noise == "none":
            return self.predict()
        return hard_concrete(self.location(), self._noise(batch), self.temperature, self.stretch)

    def predict(self) -> Tensor:
        return hard_concrete(self.location(), None, self.temperature, self.stretch)

    def ingredients(self, batch: int) -> Ingredients:
        if type(self).sample is not HardConcreteGate.sample:
            return super().ingredients(batch)
        eps = None if self.noise == "none" else self._noise(batch)
        return self.location(), eps, (self.temperature, *self.stretch)

    def logit(self) -> Tensor:
        xi, zeta = self.stretch
        return self.location() - self.temperature * math.log(-xi / zeta)  # Eq. 14


@register_gate("bernoulli")
class BernoulliGate(Gate):
    """``z ~ Bernoulli(sigmoid(log_alpha))``, the paper's `Bern`, with straight-through gradients.

    The prediction is the likelier of 0 and 1, so that conversion changes nothing.
    """

    straight_through = True

    def sample(self, batch: int) -> Tensor:
        p = torch.sigmoid(self.location())
        return (self._noise(batch) < p).to(p.dtype) + (p - p.detach())

    def predict(self) -> Tensor:
        return (self.location() > 0).float()


class _ScheduledGate(Gate):
    """A gate without parameters: a function of the schedule's `progress` in [0, 1]."""

    learned = False

    def sample(self, batch: int) -> Tensor:
        return self.predict()

    def probability(self) -> Tensor:
        return (self.predict() != 0).to(self.progress.dtype)


@register_gate("line")
class LineGate(_ScheduledGate):
    """``z`` falls linearly from 1 to 0 with the schedule: the paper's `Line`."""

    def predict(self) -> Tensor:
        return (1 - self.progress).expand(self.shape)


@register_gate("copy")
class CopyGate(_ScheduledGate):
    """``z`` is 1 in the first half of the schedule and 0 from then on: the paper's `Copy`."""

    def predict(self) -> Tensor:
        return (self.progress < 0.5).to(self.progress.dtype).expand(self.shape)
