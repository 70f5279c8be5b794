"""The settings of each kind of gate: frozen dataclasses, which turn into JSON and back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from transfer_surgery._messages import check_arguments


@dataclass(frozen=True)
class GateSettings:
    """Base class of the settings of gates; subclasses are frozen dataclasses with defaults.

    A kind of gate has a settings class and a `transfer_surgery.units.Gate` module, which
    `transfer_surgery.register_gate` ties together.
    """

    name: ClassVar[str] = ""
    """The registered name; `register_gate` sets it."""

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))

    def start(self, normal: Tensor) -> Tensor:
        """Where ``log_alpha`` starts, made of standard normal numbers: ``N(8, 1)``."""
        return normal + 8.0

    def to_dict(self) -> dict[str, Any]:
        """The registered name and all settings, as JSON can hold them; see `gate_settings`."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": self.name, **values}


@dataclass(frozen=True)
class SampledSettings(GateSettings):
    """Base class of the settings of gates that are learned and sampled; see `HardConcrete`."""

    init: str = "log_alpha"
    noise: str = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("log_alpha", "alpha"):
            raise ValueError(f"init={self.init!r}: use 'log_alpha' (keeps outputs) or 'alpha'.")
        if self.noise not in ("batch", "example", "none"):
            raise ValueError(f"noise={self.noise!r}: use 'batch', 'example' or 'none'.")

    def start(self, normal: Tensor) -> Tensor:
        start = super().start(normal)
        return start if self.init == "log_alpha" else start.clamp_min(1e-3).log()


@dataclass(frozen=True)
class HardConcrete(SampledSettings):
    """The paper's gates: ``z`` is a stretched binary concrete number, clamped to [0, 1].

    Args:
        init: ``"log_alpha"`` draws ``log_alpha ~ N(8, 1)``: a converted network is unchanged.
            ``"alpha"`` draws ``alpha ~ N(8, 1)``, as the paper words it: this changes outputs and
            is meant for training from scratch.
        noise: ``"batch"`` makes one draw per gate and forward, ``"example"`` one per gate and
            example. ``"none"`` makes no draw: training uses the gates of prediction. The noise of
            mixed gates hurts deep pretrained networks in the middle of the transfer.
        temperature: ``beta`` of Eq. 10, between 0 and 1.
        stretch: ``(xi, zeta)`` of Eq. 12, with ``xi < 0`` and ``zeta > 1``.

    Raises:
        ValueError: a setting is unknown or out of its range.

    Source: Eq. 10-16 of the paper; Louizos et al. 2018.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> model = convert(model, gate=HardConcrete(noise="none"), example_input=torch.zeros(1, 4))
        >>> model[1].gate.settings.noise
        'none'
    """

    temperature: float = 2 / 3
    stretch: tuple[float, float] = (-0.1, 1.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < 1:
            raise ValueError(
                f"temperature={self.temperature}: it must lie between 0 and 1 (Eq. 10)."
            )
        xi, zeta = self.stretch
        if not (xi < 0 and zeta > 1):
            raise ValueError(f"stretch={self.stretch}: needs xi < 0 and zeta > 1 (Eq. 12).")
        if self.init == "log_alpha" and not _least_start(xi, zeta) >= 1:
            raise ValueError(
                f"stretch={self.stretch}: gates that start from N(8, 1) would not be exactly 1, "
                "and conversion would change the outputs. Widen it, as the default (-0.1, 1.1), or "
                "use init='alpha' to train from scratch."
            )
        object.__setattr__(self, "stretch", (xi, zeta))  # JSON gives a list back


def _least_start(xi: float, zeta: float) -> float:
    """Eq. 16 five standard deviations below the mean of N(8, 1), before it is clamped."""
    return (zeta - xi) / (1 + math.exp(-3.0)) + xi


@dataclass(frozen=True)
class Bernoulli(SampledSettings):
    """``z`` is 1 with probability ``sigmoid(log_alpha)``, else 0: the paper's `Bern`.

    Args:
        init: as for `HardConcrete`.
        noise: as for `HardConcrete`.

    Raises:
        ValueError: a setting is unknown.

    Source: section 4.1 of the paper.

    Examples:
        >>> Bernoulli(noise="example").to_dict()
        {'name': 'bernoulli', 'init': 'log_alpha', 'noise': 'example'}
    """


@dataclass(frozen=True)
class Line(GateSettings):
    """``z`` falls linearly from 1 to 0 with the `TransferSchedule`: the paper's `Line`."""


@dataclass(frozen=True)
class Copy(GateSettings):
    """``z`` is 1 in the first half of the `TransferSchedule`, then 0: the paper's `Copy`."""
