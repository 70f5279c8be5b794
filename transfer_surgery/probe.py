"""A stand-in of a model that can be run and traced without touching the model.

The copy has the same module tree; its tensors are fake (shapes without memory), its hooks are gone,
and whatever a forward pass changes (running statistics, caches, training flags) changes the copy.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

__all__ = ["example_arguments", "fake_arguments", "keep_random_state", "probe_copy"]


def probe_copy(model: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """Copy a model's modules; with ``fake``, without copying its tensors.

    Raises:
        TypeError: the model cannot be deep-copied.
    """
    memo: dict[int, Any] = {}
    if fake is not None:
        for module in model.modules():
            held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            for tensor in held:
                if isinstance(tensor, Tensor):
                    memo[id(tensor)] = fake.from_tensor(tensor)
    try:
        probe = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be deep-copied ({error}), so it cannot be examined "
            "without being changed. Make it deep-copyable, then convert it."
        ) from error
    for module in probe.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            object.__setattr__(module, name, OrderedDict())
    return probe


def example_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read an example input: a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple):
        return example_input, {}
    return (example_input,), {}


def fake_arguments(arguments: Any, fake: FakeTensorMode | None) -> Any:
    """Arguments for a probe: fake tensors, or clones, with at least two examples.

    Batch normalisation refuses to train on one value per channel, hence two.
    """

    def convert(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and tensor.shape[0] == 1:
            tensor = tensor.expand(2, *tensor.shape[1:])
        tensor = tensor.detach()
        return tensor.clone() if fake is None else fake.from_tensor(tensor)

    return pytree.tree_map_only(Tensor, convert, arguments)


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Leave torch's and Python's random streams as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
