"""Any model: a guess from its first layer, kept only if the model runs on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from transfer_surgery.sites import Adapter, probe_copy, undisturbed
from zoo_adapters.base import id_batch, zero_batch

_SIZES = (224, 32, 28, 64, 96, 128, 256)
_LENGTH = 16
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase)


class GenericAdapter(Adapter):
    """Adapter for models of no known zoo, asked last.

    It guesses for models that take one argument: features for a linear layer, tokens for an
    embedding, a sequence for a recurrent layer, and for a convolution the first size that runs, 224
    before the smaller ones.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3456, 10))
        >>> GenericAdapter().example_input(model).shape
        torch.Size([2, 1, 28, 28])
    """

    priority = -1

    def matches(self, model: nn.Module) -> bool:
        return True

    def example_input(self, model: nn.Module) -> Tensor | None:
        if not _takes_one_argument(model):
            return None
        return next((guess for guess in _guesses(model) if _runs(model, guess)), None)


def _takes_one_argument(model: nn.Module) -> bool:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # scripted or traced code has no signature
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(required) == 1


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that the first layer accepts, the likeliest first."""
    match next((module for module in model.modules() if isinstance(module, _LAYERS)), None):
        case nn.Linear(in_features=features):
            yield zero_batch(model, (features,))
            yield zero_batch(model, (_LENGTH, features))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() as layer:
            for size in _SIZES:
                yield zero_batch(model, (layer.in_channels, *(size for _ in layer.kernel_size)))
        case nn.Embedding():
            yield id_batch(model, _LENGTH)
        case nn.RNNBase(input_size=features):
            yield zero_batch(model, (_LENGTH, features))


def _runs(model: nn.Module, guess: Tensor) -> bool:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    probe, guess = probe_copy(model, fake).eval(), fake.from_tensor(guess)
    try:
        with undisturbed(), torch.no_grad(), fake:
            probe(guess)
    except Exception:  # whatever a model raises on what is not its input
        return False
    return True
