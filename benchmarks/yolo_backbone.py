"""A small network in the manner of YOLOv5: one SiLU module, in place, serves all its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution, batch norm and the activation, which all blocks of a network share."""

    def __init__(
        self, act: nn.Module, inputs: int, outputs: int, kernel: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two blocks and a shortcut."""

    def __init__(self, act: nn.Module, width: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(act, width, width)
        self.cv2 = ConvBlock(act, width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3(nn.Module):
    """Half of the channels go through bottlenecks, the others past them."""

    def __init__(self, act: nn.Module, width: int, depth: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(act, width, width // 2)
        self.cv2 = ConvBlock(act, width, width // 2)
        self.cv3 = ConvBlock(act, width, width)
        self.m = nn.Sequential(*(Bottleneck(act, width // 2) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    """Maxima over growing neighbourhoods, side by side."""

    def __init__(self, act: nn.Module, width: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(act, width, width // 2)
        self.cv2 = ConvBlock(act, width * 2, width)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.cv1(x)]
        for _ in range(3):
            seen.append(self.m(seen[-1]))
        return self.cv2(torch.cat(seen, 1))


class YoloBackbone(nn.Module):
    """A classifier of 32x32 images: stem, three stages of C3, SPPF, pooling, a linear layer."""

    def __init__(self, width: int = 16, depths: tuple[int, ...] = (1, 2, 1)) -> None:
        super().__init__()
        act = nn.SiLU(inplace=True)
        layers: list[nn.Module] = [ConvBlock(act, 3, width, 3)]
        for depth in depths:
            layers += [ConvBlock(act, width, 2 * width, 3, 2), C3(act, 2 * width, depth)]
            width *= 2
        self.model = nn.Sequential(*layers, SPPF(act, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x).mean((2, 3)))
