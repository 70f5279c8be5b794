"""Which kernel a unit in training uses: Triton's on a GPU where it agrees with the eager one.

``TRANSFER_SURGERY_KERNELS=eager`` in the environment switches Triton's off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from transfer_surgery.activations import get_activation
from transfer_surgery.units.kernels.eager import gated

VARIABLE = "TRANSFER_SURGERY_KERNELS"


class KernelWarning(UserWarning):
    """The Triton kernels fail here, or compute something else: the slower eager ones are used."""


def triton_kernels(x: Tensor) -> ModuleType | None:
    """The module `transfer_surgery.units.kernels.triton.op` if it is to be used for an input."""
    if not x.is_cuda or torch.compiler.is_compiling() or os.environ.get(VARIABLE) == "eager":
        return None
    if type(x) not in (Tensor, torch.nn.Parameter):  # nothing can be tried among fake tensors
        return None
    if torch.cuda.is_current_stream_capturing():  # no trial in there, and no compilation
        return None
    return trusted_kernels(x.device)


@functools.cache
def trusted_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels, after a trial on a device; None where Triton is missing or they fail."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("transfer_surgery.units.kernels.triton.op")
        with _undisturbed():
            _try(kernels, device)
    except Exception as error:
        warnings.warn(
            f"the Triton kernels do not work on {device}: {type(error).__name__}: {error}. The "
            f"eager ones are used; {VARIABLE}=eager says so from the start, without this warning.",
            KernelWarning,
            stacklevel=2,
        )
        return None
    return kernels


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients, whatever the unit that asks runs in; activation checkpoints do not notice."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        yield


def _try(kernels: ModuleType, device: torch.device) -> None:
    """Compare with the eager kernel; gates of all three kinds, in both memory formats."""
    pair = get_activation("relu"), get_activation("sin")
    values = torch.linspace(-4, 4, 2 * 3 * 20, device=device).view(2, 3, 4, 5)
    z = torch.tensor([0.0, 0.3, 1.0], device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = values.to(memory_format=memory_format)
        found = []
        for kernel in (
            functools.partial(kernels.gated_triton, noise=None, granularity="channel"),
            lambda x, gates, source, target: gated(x, gates.view(3, 1, 1), source, target),
        ):
            leaves = [x.clone().requires_grad_(), z.clone().requires_grad_()]
            y = kernel(leaves[0], leaves[1], source=pair[0], target=pair[1])
            # Triton's gates at the ends get no gradient.
            grads = torch.autograd.grad(y, leaves, torch.cos(3 * x))
            found.append((y.detach(), grads[0], grads[1][1]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
