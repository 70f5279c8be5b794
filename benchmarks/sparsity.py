"""Which share of what the activations of a network give is exactly zero."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery import GatedActivation, convert
from transfer_surgery.units import Polynomial


def share_of_zeros(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Count exact zeros behind the activations of a network without gates.

    A copy of the network with a unit at each hidden activation does the counting. Where `bake` left
    a fitted target, the zeros behind its offset count, not those of the function inside; but for
    polynomials, which are no activations to convert.
    """
    counted = copy.deepcopy(model).eval()
    zeros = elements = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal zeros, elements
        zeros += output.numel() - int(output.count_nonzero())
        elements += output.numel()

    for module in _activations(counted, batches[0]):
        module.register_forward_hook(count)
    with torch.inference_mode():
        for batch in batches:
            counted(batch)
    return zeros / elements


def _activations(counted: nn.Module, images: Tensor) -> set[nn.Module]:
    if polynomials := {m for m in counted.modules() if isinstance(m, Polynomial)}:
        return polynomials
    convert(counted, "identity", granularity="layer", example_input=images)
    modules = dict(counted.named_modules())
    units = [path for path, module in modules.items() if isinstance(module, GatedActivation)]
    parents = {path: modules[path.rpartition(".")[0]] for path in units}
    return {
        parent if type(parent).__module__.startswith("transfer_surgery.") else modules[path]
        for path, parent in parents.items()
    }
