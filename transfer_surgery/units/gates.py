"""Gates: the random variables ``z`` that choose between source (1) and target (0), section 3.3.

A gate module holds one number per gate and answers three questions: a sample for training, the
value for prediction, and ``P(z != 0)`` for the structural risk. The paper's kinds of gates are in
`gate_kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._sharding import gathered
from transfer_surgery.units.float32 import Float32Module
from transfer_surgery.units.kernels import values_readable
from transfer_surgery.units.noise import draw_uniform
from transfer_surgery.units.settings import GateSettings, SampledSettings

GateShape = tuple[int, ...]

# With eps in [2**-25, 1 - 2**-24] no draw moves a gate that is this far out: see `draw_noise`.
_CERTAIN = 19.0

_REGISTRY: dict[str, type[Gate]] = {}


def register_gate(name: str, settings: type[GateSettings]) -> Callable[[type[Gate]], type[Gate]]:
    """Register a kind of gate: its name, its settings and its module; a class decorator.

    ``convert(gate=settings(...))`` then builds the decorated `Gate` module at each site, and
    ``convert(gate=name)`` is short for ``convert(gate=settings())``.

    Args:
        name: the short form, also the name in files.
        settings: a frozen dataclass, derived from `GateSettings`, with defaults.

    Raises:
        ValueError: the name, or the settings class, is taken.
    """
    check_arguments(register_gate, locals())
    if name in _REGISTRY:
        raise ValueError(f"gate {name!r} is already registered; choose another name.")
    if vars(settings).get("name"):
        raise ValueError(
            f"{settings.__name__} has the gate {settings.name!r} already; each gate needs a "
            "settings class of its own."
        )

    def decorate(cls: type[Gate]) -> type[Gate]:
        _REGISTRY[name] = cls
        settings.name = name
        cls.settings_type = settings
        return cls

    return decorate


def registered_gates() -> tuple[str, ...]:
    """Names of all registered gates, sorted."""
    return tuple(sorted(_REGISTRY))


def gate_settings(gate: str | GateSettings | Mapping[str, Any]) -> GateSettings:
    """The settings that a short form, or `GateSettings.to_dict`, stands for.

    Args:
        gate: settings, which are returned as they are; a registered name; or a dict with the
            name and settings.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or a setting is.

    Examples:
        >>> gate_settings("line")
        Line()
        >>> gate_settings({"name": "bernoulli", "noise": "none"})
        Bernoulli(init='log_alpha', noise='none')
    """
    if isinstance(gate, GateSettings):
        kind = _REGISTRY.get(gate.name)
        if kind is None or kind.settings_type is not type(gate):
            cls = type(gate).__name__
            raise ValueError(f"{cls} has no gate: put @register_gate(name, {cls}) above its class.")
        return gate
    if isinstance(gate, type):
        raise ValueError(f"gate={gate.__name__}: a class; write {gate.__name__}().")
    values = dict(gate) if isinstance(gate, Mapping) else {"name": gate}
    name = values.pop("name", None)
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown gate {name!r}. Known: {', '.join(registered_gates())}. "
            "Add your own with @register_gate(name, settings)."
        )
    settings = _REGISTRY[name].settings_type
    try:
        return settings(**values)
    except TypeError as error:
        raise ValueError(f"gate {name!r}: {error}.") from error


def make_gate(
    gate: str | GateSettings, shape: GateShape, generator: torch.Generator | None = None
) -> Gate:
    """Build the gates of one site.

    Args:
        gate: their settings, or a registered name.
        shape: as for `Gate`.
        generator: source of the initial values; None: torch's global one.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    settings = gate_settings(gate)
    return _REGISTRY[settings.name](shape, settings, generator=generator)


def probability_of(logit: Tensor) -> Tensor:
    """``sigmoid(s)`` with an exact gradient.

    It is sigmoid(s) * sigmoid(-s) at any s; that of torch.sigmoid is q * (1 - q) of the rounded q:
    off by 1e-3 at log_alpha = 8 in float32, and exactly 0 above 15.
    """
    return F.logsigmoid(logit).exp()


def check_no_sample_gradients(parameter: Tensor) -> None:
    """Raise where opacus wants a gradient per example: the examples share a draw of the gates.

    Raises:
        ValueError: it has marked the parameter.
    """
    if hasattr(parameter, "grad_sample"):
        raise ValueError(
            "gates have no gradient per example, which opacus asks for. Call bake(model) first, or "
            "requires_grad_(False) of each GatedActivation."
        )


class Gate(Float32Module):
    """Base class of gates.

    Args:
        shape: shape of the gates of one site: ``(1,)`` per layer (FSDP2 takes no scalars),
            ``(C,)`` per channel, the feature shape per neuron.
        settings: of the class that the gate is registered with; None: its defaults.
        generator: source of the initial values, ``log_alpha ~ N(8, 1)``; with a generator the
            global random state stays untouched.
    """

    settings_type: type[GateSettings]
    """What the gate is registered with."""
    learned = True
    """Whether the gate has a ``log_alpha``; otherwise `progress` is set by the schedule."""
    straight_through = False
    """Whether the gradient with respect to ``z`` counts where ``z`` is exactly 0 or 1."""

    settings: GateSettings
    log_alpha: nn.Parameter
    progress: Tensor

    def __init__(
        self,
        shape: GateShape,
        settings: GateSettings | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.settings = self.settings_type() if settings is None else settings
        if self.learned:
            # Float32 on the generator's device, whatever torch's defaults are.
            place = None if generator is None else generator.device
            normal = torch.randn(self.shape, generator=generator, dtype=torch.float32, device=place)
            self.log_alpha = nn.Parameter(self.settings.start(normal))
        else:
            self.register_buffer("progress", torch.zeros((), dtype=torch.float32))

    @property
    def count(self) -> int:
        """Number of gates."""
        return math.prod(self.shape)

    def forward(self, batch: int) -> Tensor:
        """``z`` as the training flag says; a call, so that hooks of the gate see its parameter."""
        if self.learned:
            check_no_sample_gradients(self.log_alpha)
        return self.sample(batch) if self.training else self.predict()

    def sample(self, batch: int) -> Tensor:
        """Training value of ``z``: ``shape``, or ``(batch, *shape)`` with noise per example."""
        raise NotImplementedError

    def predict(self) -> Tensor:
        """Prediction value of ``z``, of the gates' shape, float32."""
        raise NotImplementedError

    def full_log_alpha(self) -> Tensor:
        """``log_alpha`` in float32 and whole, where FSDP2 shards it or its policy casts it."""
        return gathered(self.log_alpha).float()

    def logit(self) -> Tensor:
        """``s`` with ``P(z != 0) = sigmoid(s)``: ``log_alpha`` plus a constant, per gate.

        The transfer schedule relies on that form: a number added to ``log_alpha`` adds to ``s``.
        """
        return self.full_log_alpha()

    def probability(self) -> Tensor:
        """``P(z != 0)`` per gate, of the gates' shape, differentiable where `learned`."""
        return probability_of(self.logit())

    def extra_repr(self) -> str:
        return f"{self.settings.name}, shape={self.shape}"


class SampledGate(Gate):
    """Base class of gates that are learned and drawn at random; see `SampledSettings`."""

    settings: SampledSettings

    def draw_noise(self, batch: int) -> Tensor:
        """``eps ~ U(0, 1)`` of Eq. 15, never exactly 0 or 1.

        No random number is drawn where none can matter (every ``|log_alpha|`` beyond 19, seen on
        CPU only, where looking costs no synchronisation): a network whose gates are all at 1 then
        trains with the random stream, hence the dropout masks, of the original.
        """
        noise = self.settings.noise
        shape = (batch, *self.shape) if noise == "example" else self.shape
        log_alpha = self.log_alpha.detach()
        certain = values_readable(log_alpha) and log_alpha.abs().min().item() >= _CERTAIN
        if noise == "none" or certain:
            return torch.full(shape, 0.5, dtype=torch.float32, device=log_alpha.device)
        return draw_uniform(self, log_alpha, shape)
