"""Small networks that several tests convert: always the same weights, and no global random state.

`small_mlp` takes 3 features. The others take images of 2 channels, 5 by 5, and all give 2 outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = (3,)
IMAGE = (2, 5, 5)


def small_mlp(width: int = 6, bias: bool = True) -> nn.Sequential:
    """Two hidden layers; the activations are at "1" and "3"."""
    with _fixed_weights():
        return nn.Sequential(
            nn.Linear(3, width, bias),
            nn.ReLU(),
            nn.Linear(width, width, bias),
            nn.ReLU(),
            nn.Linear(width, 2, bias),
        )


def small_cnn() -> nn.Sequential:
    """Convolutions and a batch norm; an in-place ReLU at "2" and a GELU at "3.1"."""
    with _fixed_weights():
        return nn.Sequential(
            # A bias before a batch norm has a gradient of rounding alone, which Adam blows up.
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Sequential(nn.Conv2d(6, 8, 3), nn.GELU()),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 2),
        )


def functional() -> nn.Module:
    """Activations that are functions and methods, in place and not."""
    with _fixed_weights():
        return _Functional()


def in_place() -> nn.Module:
    """A network that reads the input of its in-place activation once more."""
    with _fixed_weights():
        return _InPlace()


def example_of(model: nn.Module, batch: int = 2) -> Tensor:
    """Zeros that one of these networks takes, converted or not."""
    return torch.zeros(batch, *input_shape(model))


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one example for one of these networks."""
    first = next(p for p in model.parameters() if p.dim() > 1)
    return FEATURES if first.shape[1:] == FEATURES else IMAGE


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6 * 3 * 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.first(x)))
        x = F.relu(self.second(x) - x.mean(), inplace=True)
        y = x * 0.5 - 0.1
        return self.head((F.silu(y) + (y + 0.1).relu_()).flatten(1))


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.head = nn.Linear(50, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        y = self.act(x)
        return self.head(x + y)


@contextmanager
def _fixed_weights() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
