"""Where and how a network of the paper is trained."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Machine:
    """A device and what makes training fast on it.

    Args:
        device: ``"cpu"``, ``"cuda"`` or, one of several, ``"cuda:1"``.
        precision: ``"fp32"``; ``"tf32"``: faster matrix products on CUDA; ``"bf16"``: convolutions
            and linear layers in bfloat16, all else in float32, faster on CPUs that have the
            instructions (``avx512_bf16``, ``amx_bf16``).
        compile: whether `torch.compile` makes one CUDA graph (on a CPU: fused loops) of each of
            forward and backward.
        threads: of the CPU, for each training.
    """

    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "tf32", "bf16"):
            raise ValueError(f"precision={self.precision!r}: use 'fp32', 'tf32' or 'bf16'.")
        if self.device.partition(":")[0] not in ("cpu", "cuda") or self.threads < 1:
            raise ValueError(
                f"device={self.device!r}, threads={self.threads}: use 'cpu' or 'cuda', and 1 "
                "thread or more."
            )
        if self.is_cuda and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch sees no CUDA device; use 'cpu'.")

    @classmethod
    def choose(
        cls, device: str = "auto", precision: str | None = None, compile: bool | None = None
    ) -> Machine:
        """The fastest way where nothing else is asked for.

        On CUDA that is TF32, which rounds the factors of products only, with compiled steps.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        is_cuda = device.startswith("cuda")
        chosen = precision or ("tf32" if is_cuda else "fp32")
        return cls(device, chosen, is_cuda if compile is None else compile)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def name(self) -> str:
        """The device as a reader knows it."""
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def side_by_side(self) -> int:
        """Trainings at a time: one does not fill a GPU; on a CPU each has threads of its own."""
        return 4 if self.is_cuda else max((os.cpu_count() or 1) // self.threads, 1)

    def prepare(self) -> torch.device:
        """Set this process up for a training."""
        device = torch.device(self.device)
        if self.is_cuda and device.index is not None:
            torch.cuda.set_device(device)
        if self.compile:
            torch.compiler.reset()  # torch counts another network as a recompilation, up to 8
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        return device

    def autocast(self) -> AbstractContextManager[None]:
        """The products in bfloat16, if so; it has the range of float32: there is no GradScaler."""
        kind = "cuda" if self.is_cuda else "cpu"
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")

    def widen_products(self, model: nn.Module) -> None:
        """Let what follows a convolution or linear layer compute in float32.

        Autocast alone would hand the 8 bits of bfloat16 on through norms to activations: a sine
        would see an argument beyond 8 off by up to 0.03.
        """
        if self.precision == "bf16":
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.register_forward_hook(_as_float32)


def _as_float32(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()
