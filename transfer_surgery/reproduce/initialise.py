"""The starting weights of section 4.2: random Fourier features for *sin*, Kaiming for the rest."""

from __future__ import annotations

import math

from torch import nn

from transfer_surgery.reproduce.protocol import Protocol

__all__ = ["initialise"]


def initialise(model: nn.Module, activation: str, protocol: Protocol) -> None:
    """Draw all weights and biases of linear and convolutional layers anew, in place.

    Args:
        model: a network before conversion.
        activation: its activation. With ``"sin"`` weights come from N(0, sin_std**2) and biases
            from U(-pi, pi), as random Fourier features have them (Rahimi and Recht 2008), unless
            the protocol says otherwise.
        protocol: says which of He's distributions the others get.
    """
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        if activation == "sin" and protocol.sin_init == "fourier":
            nn.init.normal_(layer.weight, 0.0, protocol.sin_std)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -math.pi, math.pi)
        elif protocol.kaiming == "normal":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        else:
            layer.reset_parameters()
