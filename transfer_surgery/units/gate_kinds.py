"""The paper's gates: the hard-concrete one, and the baselines of section 4.1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfer_surgery.units.gates import Gate, SampledGate, register_gate
from transfer_surgery.units.kernels import hard_concrete, rectified
from transfer_surgery.units.settings import Bernoulli, Copy, HardConcrete, Line


@register_gate("hard_concrete", HardConcrete)
class HardConcreteGate(SampledGate):
    """Rectified binary concrete gate, Eq. 10-16 (Louizos et al. 2018).

    Examples:
        >>> gate = HardConcreteGate((3,))
        >>> gate.predict()
        tensor([1., 1., 1.], grad_fn=<ClampBackward1>)
    """

    settings: HardConcrete

    def sample(self, batch: int) -> Tensor:
        if self.settings.noise == "none":
            return self.predict()
        eps, settings = self.draw_noise(batch), self.settings
        return hard_concrete(self.full_log_alpha(), eps, settings.temperature, settings.stretch)

    def predict(self) -> Tensor:
        return rectified(torch.sigmoid(self.full_log_alpha()), self.settings.stretch)

    def logit(self) -> Tensor:
        xi, zeta = self.settings.stretch
        return self.full_log_alpha() - self.settings.temperature * math.log(-xi / zeta)  # Eq. 14


@register_gate("bernoulli", Bernoulli)
class BernoulliGate(SampledGate):
    """``z ~ Bernoulli(sigmoid(log_alpha))``, the paper's `Bern`, with straight-through gradients.

    The prediction is the likelier of 0 and 1, so that conversion changes nothing.
    """

    straight_through = True

    def sample(self, batch: int) -> Tensor:
        p = torch.sigmoid(self.full_log_alpha())
        return (self.draw_noise(batch) < p).to(p.dtype) + (p - p.detach())

    def predict(self) -> Tensor:
        return (self.full_log_alpha() > 0).float()


class _ScheduledGate(Gate):
    """A gate without parameters: a function of the schedule's `progress` in [0, 1]."""

    learned = False

    def sample(self, batch: int) -> Tensor:
        return self.predict()

    def probability(self) -> Tensor:
        return (self.predict() != 0).to(self.progress.dtype)


@register_gate("line", Line)
class LineGate(_ScheduledGate):
    """``z`` falls linearly from 1 to 0 with the schedule: the paper's `Line`."""

    def predict(self) -> Tensor:
        return (1 - self.progress).expand(self.shape)


@register_gate("copy", Copy)
class CopyGate(_ScheduledGate):
    """``z`` is 1 in the first half of the schedule and 0 from then on: the paper's `Copy`."""

    def predict(self) -> Tensor:
        return (self.progress < 0.5).to(self.progress.dtype).expand(self.shape)
