"""Figure 1: one neuron ``act(w * x)`` fits ``sin(2x)``, from w = 6, as resin, sin and resin->sin.

The trainings of all seeds run side by side, as the channels of one network: all of it is
element-wise and the loss is a sum over seeds, so no seed sees another.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from networks import TARGET, find_row, gate_of
from protocol import Settings
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery import (
    GatedActivation,
    convert,
    get_activation,
    wrap_optimizer,
)
from transfer_surgery.activations import ActivationModule

NETWORKS = ("resin", "sin", "resin->sin")

_END = 2 * math.pi
_GOAL = 2.0
_NEAR = 0.05
_RECORDS = 199


@dataclass(frozen=True)
class Figure1Settings(Settings):
    """All settings of the training. The paper gives w = 6 and the interval; the rest is ours.

    Args:
        steps: of the optimizer.
        optimizer: ``"adam"`` or ``"sgd"``.
        lr: learning rate of w.
        momentum: of SGD.
        weight_decay: of w, added to its gradient.
        points: evenly spaced on [-2 pi, 2 pi], both ends included.
        batch: points drawn for each step and seed; 0: all points. With small batches *sin* leaves
            the minimum next to 6, for other poor ones.
        gamma: weight of the structural risk.
        gate_lr: learning rate of the gates as a multiple of `lr`. *resin* has to reach w = 2 before
            its gate leaves 1: gates have to be slower than w.
        noise: one draw of the gate per ``"batch"`` or per ``"example"``, or ``"none"``.
        init: what is drawn from N(8, 1), ``"log_alpha"`` or ``"alpha"`` (the paper's word).
        seeds: number of independent trainings.
        seed: of everything random.
        w: where w starts.
        w_jitter: standard deviation of that start over seeds.
    """

    steps: int = 4000
    optimizer: str = "adam"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    points: int = 257
    batch: int = 0
    gamma: float = 1.0
    gate_lr: float = 0.05
    noise: str = "example"
    init: str = "log_alpha"
    seeds: int = 50
    seed: int = 0
    w: float = 6.0
    w_jitter: float = 0.0

    def __post_init__(self) -> None:
        if min(self.steps, self.seeds) < 1 or self.points < 2 or self.batch < 0 or self.lr <= 0:
            raise ValueError(
                f"steps={self.steps}, seeds={self.seeds} and lr={self.lr} must be positive, "
                f"points={self.points} at least 2, batch={self.batch} at least 0."
            )
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}: use 'adam' or 'sgd'.")


@dataclass(frozen=True)
class Outcome:
    """Where the trainings of one network ended, and how the first seed came there.

    Args:
        w: final weights, one per seed.
        z: final gates as of prediction (Eq. 16): 1 is resin, 0 is sin.
        steps: at which the first seed was recorded, the start and the end among them.
        trace: its (w, z) at these steps, of shape (len(steps), 2).
    """

    w: Tensor
    z: Tensor
    steps: tuple[int, ...]
    trace: Tensor

    @property
    def found(self) -> Tensor:
        """Per seed, whether it is the sine of w = 2 and nothing else."""
        return ((self.w - _GOAL).abs() < _NEAR) & (self.z == 0)


class _Neurons(nn.Module):
    """One neuron without bias per seed, side by side: (N, seeds) to (N, seeds)."""

    def __init__(self, activation: str, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.act = ActivationModule(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x * self.weight)

    @torch.no_grad()
    def state(self) -> Tensor:
        """(w, z) of each seed, of shape (seeds, 2), float64."""
        if isinstance(self.act, GatedActivation):
            z = self.act.gate.predict()
        else:
            z = torch.full_like(self.weight, float(self.act.activation.name != TARGET))
        return torch.stack([self.weight, z], dim=1).double()


def grid(points: int) -> Tensor:
    """The inputs: evenly spaced numbers on [-2 pi, 2 pi] with both ends, float64."""
    return torch.linspace(-_END, _END, points, dtype=torch.float64)


def neuron(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """``z * resin(w * x) + (1 - z) * sin(w * x)``, Eq. 1."""
    source, target = get_activation("resin"), get_activation(TARGET)
    return z * source(w * x) + (1 - z) * target(w * x)


def loss(w: Tensor, z: Tensor, points: int) -> Tensor:
    """Solution space of Figure 1: mean squared error over the grid, at each w and z, float64.

    Examples:
        >>> resin_then_sin = loss(torch.tensor(2.0), torch.tensor([1.0, 0.0]), points=257)
        >>> [round(value, 2) for value in resin_then_sin.tolist()]
        [1.47, 0.0]
    """
    x = grid(points)
    y = neuron(x, w.double()[..., None], z.double()[..., None])
    return (y - torch.sin(2 * x)).square().mean(-1)


def train(network: str, settings: Figure1Settings) -> Outcome:
    """Train one of `NETWORKS` from all seeds. The global random state is left alone."""
    row, shape, trace = find_row(network), (settings.seeds,), []
    # w moves fast at first, the gate late and slowly.
    steps = sorted({round(settings.steps * (i / _RECORDS) ** 2) for i in range(_RECORDS + 1)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _Neurons(row.source, settings.w + settings.w_jitter * torch.randn(shape))
        everything = grid(settings.points).float()
        inputs = everything[:, None].expand(-1, settings.seeds)
        if row.gate is not None:
            gate = gate_of(row.gate, init=settings.init, noise=settings.noise)
            convert(model, TARGET, gate=gate, seed=settings.seed, example_input=inputs)
        optimizer = _optimizer(model, settings)
        for step in range(settings.steps):
            if step in steps:
                trace.append(model.state()[0])
            if settings.batch:
                chosen = torch.randint(settings.points, (settings.batch, settings.seeds))
                inputs = everything[chosen]
            optimizer.zero_grad()
            error = model(inputs) - torch.sin(2 * inputs)
            error.square().mean(dim=0).sum().backward()
            optimizer.step()
    w, z = model.state().unbind(dim=1)
    return Outcome(w, z, tuple(steps), torch.stack([*trace, model.state()[0]]))


def _optimizer(model: _Neurons, settings: Figure1Settings) -> Optimizer:
    weights, lr, decay = model.parameters(), settings.lr, settings.weight_decay
    optimizer: Optimizer
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(weights, lr, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(weights, lr, settings.momentum, weight_decay=decay)
    if not isinstance(model.act, GatedActivation):
        return optimizer
    return wrap_optimizer(
        optimizer, model, gamma=settings.gamma, gate_lr=settings.gate_lr * lr, gate_weight_decay=0.0
    )


def run_figure1(settings: Figure1Settings) -> dict[str, Any]:
    """Train the three networks of Figure 1 from many seeds.

    Returns:
        Plain JSON: the settings, and per network the final w, gate z and loss of each seed, the
        share of the seeds that found w = 2 with the gate at 0, and the (step, w, z, loss) of the
        first seed, all to six digits. What was learned is ``neuron(x, w, z)``.

    Source:
        Section 1 of the paper, Figure 1. Its text says of *resin* that w = 0 is the global
        optimum, not that it is reached, and that it captures [-pi/4, pi/4], as it does at w = 2.
    """
    began = time.perf_counter()
    networks = {}
    for network in NETWORKS:
        outcome = train(network, settings)
        w, z = outcome.trace.unbind(dim=1)
        networks[network] = {
            "found": _rounded(outcome.found.double().mean()),
            "w": _rounded(outcome.w),
            "z": _rounded(outcome.z),
            "loss": _rounded(loss(outcome.w, outcome.z, settings.points)),
            "trace": {
                "step": list(outcome.steps),
                "w": _rounded(w),
                "z": _rounded(z),
                "loss": _rounded(loss(w, z, settings.points)),
            },
        }
    return {
        "settings": settings.to_dict(),
        "x": {"from": -_END, "to": _END, "points": settings.points},
        "networks": networks,
        "torch": torch.__version__,
        "device": "cpu",
        "seconds": round(time.perf_counter() - began, 1),
    }


def _rounded(values: Tensor) -> Any:
    """A number or a list of numbers, to six digits."""
    if values.dim() == 0:
        return float(f"{values.item():.6g}")
    return [float(f"{value:.6g}") for value in values.tolist()]
