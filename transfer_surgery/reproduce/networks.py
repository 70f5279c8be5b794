"""The networks of section 4: a multilayer perceptron, LeNet-5, and ResNets for 32x32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery.activations import ActivationModule

__all__ = ["LeNet5", "ResNet", "perceptron"]


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

    Pooled first, then activated, as in LeCun et al. (1998) and PyTorch's example: for monotonic
    activations the same as the other way round, at a quarter of the cost.

    Args:
        activation: a registered name, such as ``"tanh"``.
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
        return self.fc3(self.act4(self.fc2(x)))  # type: ignore[no-any-return]


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
        return self.act2(y + x)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56 or 110 of He et al. (2016) for images of shape (N, 3, 32, 32).

    Args:
        activation: a registered name, such as ``"relu"``.
        depth: 6n + 2.

    Raises:
        ValueError: no such depth.
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
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, blocks: int, activation: str) -> nn.Sequential:
    first = _Block(inputs, outputs, activation)
    rest = (_Block(outputs, outputs, activation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
