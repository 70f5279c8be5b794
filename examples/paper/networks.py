"""The ten networks of section 4.1 on three architectures: how each starts and comes to the sine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from protocol import Protocol
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery import Bernoulli, HardConcrete, TransferSchedule, convert, wrap_optimizer
from transfer_surgery.activations import ActivationModule

TARGET = "sin"
_SAMPLED = {"hard_concrete": HardConcrete, "bernoulli": Bernoulli}


def perceptron(activation: str, width: int = 400, layers: int = 3) -> nn.Sequential:
    """The 400x400x400 network of section 4.3, from one number to one number.

    Args:
        activation: a registered name, such as ``"resin"``.
        width: units of each hidden layer.
        layers: number of hidden layers.
    """
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [nn.Linear(width if layer else 1, width), ActivationModule(activation)]
    return nn.Sequential(*parts, nn.Linear(width, 1))


class LeNet5(nn.Module):
    """LeNet-5 for images of shape (N, 1, 28, 28), with max pooling, as it is built today.

    It pools first and activates then, as LeCun et al. (1998) and PyTorch's example do: for
    monotonic activations that is the same as the other way round, at a quarter of the cost.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.act1 = ActivationModule(activation)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.act2 = ActivationModule(activation)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.act3 = ActivationModule(activation)
        self.fc2 = nn.Linear(120, 84)
        self.act4 = ActivationModule(activation)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(F.max_pool2d(self.conv1(x), 2))
        x = self.act2(F.max_pool2d(self.conv2(x), 2))
        x = self.act3(self.fc1(x.flatten(1)))
        return self.fc3(self.act4(self.fc2(x)))


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A)."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = ActivationModule(activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = ActivationModule(activation)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return self.act2(y + x)


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56 or 110 of He et al. (2016) for images of shape (N, 3, 32, 32).

    Raises:
        ValueError: the depth is not 6n + 2.
    """

    def __init__(self, activation: str, depth: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth}: use 6n + 2, such as 20, 56 or 110.")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = ActivationModule(activation)
        self.layer1 = _stage(16, 16, blocks, activation)
        self.layer2 = _stage(16, 32, blocks, activation)
        self.layer3 = _stage(32, 64, blocks, activation)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, activation: str) -> nn.Sequential:
    first = _Block(inputs, outputs, activation)
    rest = (_Block(outputs, outputs, activation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def initialise(model: nn.Module, activation: str, protocol: Protocol) -> None:
    """Draw all weights and biases of linear and convolutional layers anew, in place (section 4.2).

    With ``"sin"`` weights come from N(0, sin_std**2) and biases from U(-pi, pi), as random Fourier
    features have them (Rahimi and Recht 2008), unless the protocol says otherwise. The protocol
    also says which of He's distributions the other activations get.
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


def gate_of(kind: str, init: str, noise: str) -> str | HardConcrete | Bernoulli:
    """The gates of a kind, with these settings where they are sampled; line and copy are not."""
    return _SAMPLED[kind](init=init, noise=noise) if kind in _SAMPLED else kind


@dataclass(frozen=True)
class Row:
    """One network of the paper's tables.

    Args:
        name: as in the paper, with ``->`` for its arrow.
        source: the activation that it starts with.
        gate: the kind of gate between that and the sine; None: it stays as it is.
    """

    name: str
    source: str
    gate: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.replace("->", "-to-").lower()

    @property
    def learned(self) -> bool:
        """Whether its gates are learned, that is, whether gamma matters."""
        return self.gate in ("hard_concrete", "bernoulli")

    def convert(self, model: nn.Module, protocol: Protocol, example: Tensor) -> nn.Module:
        """Put this row's gates into a network that has its `source` everywhere, in place."""
        if self.gate is None:
            return model
        return convert(
            model,
            TARGET,
            gate=gate_of(self.gate, init=protocol.init, noise=protocol.noise),
            granularity=protocol.granularity,
            example_input=example,
        )

    def wrap(
        self, optimizer: Optimizer, model: nn.Module, protocol: Protocol, steps: int
    ) -> Optimizer:
        """Let the optimizer of a converted model move this row's gates.

        Args:
            optimizer: of the converted model's parameters.
            model: the converted model.
            protocol: gamma and the speed of the gates.
            steps: optimizer steps of the whole training, for *Copy* and *Line*.
        """
        if self.gate is None:
            return optimizer
        if not self.learned:
            whole = TransferSchedule(steps, start=0.0, end=1.0, shape="linear")
            return wrap_optimizer(optimizer, model, transfer=whole)
        return wrap_optimizer(
            optimizer,
            model,
            gamma=protocol.gamma,
            gate_lr=protocol.gate_lr * protocol.lr,
            gate_weight_decay=protocol.gate_weight_decay,
            reduction=protocol.reduction,
        )


# The paper does not name the source of Line and Bern. That of Copy is resin, so theirs is here too.
ROWS = (
    Row("sin", "sin"),
    Row("resin", "resin"),
    Row("tanh", "tanh"),
    Row("relu", "relu"),
    Row("Copy", "resin", "copy"),
    Row("Line", "resin", "line"),
    Row("Bern", "resin", "bernoulli"),
    Row("resin->sin", "resin", "hard_concrete"),
    Row("tanh->sin", "tanh", "hard_concrete"),
    Row("relu->sin", "relu", "hard_concrete"),
)


def find_row(name: str) -> Row:
    """The row of this name or slug, in any case.

    Raises:
        ValueError: there is none; the message lists all.

    Examples:
        >>> find_row("relu-to-sin").name
        'relu->sin'
    """
    for row in ROWS:
        if name.lower() in (row.name.lower(), row.slug):
            return row
    raise ValueError(f"unknown network {name!r}. Known: {', '.join(row.name for row in ROWS)}.")
