"""Which share of what the activations of a network give is exactly zero."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery import GatedActivation, convert


def share_of_zeros(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Count exact zeros behind the activations of a network without gates.

    A copy of the network with a unit at each hidden activation does the counting. Where `bake` left
    a fitted target, the zeros behind its offset count, not those of the function inside.
    """
    counted = copy.deepcopy(model).eval()
    convert(counted, "identity", granularity="layer", example_input=batches[0])
    modules = dict(counted.named_modules())
    units = [path for path, module in modules.items() if isinstance(module, GatedActivation)]
    parents = {path: modules[path.rpartition(".")[0]] for path in units}
    watched = {
        parent if type(parent).__module__.startswith("transfer_surgery.") else modules[path]
        for path, parent in parents.items()
    }
    zeros = elements = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal zeros, elements
        zeros += output.numel() - int(output.count_nonzero())
        elements += output.numel()

    for module in watched:
        module.register_forward_hook(count)
    with torch.inference_mode():
        for batch in batches:
            counted(batch)
    return zeros / elements
