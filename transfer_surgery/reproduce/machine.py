"""Where and how a network of the paper is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """A device and what makes training fast on it.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"fp32"``; ``"tf32"``: faster matrix products on CUDA; ``"bf16"``: autocast.
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
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch sees no CUDA device; use 'cpu'.")

    @classmethod
    def fastest(cls) -> Machine:
        """CUDA with bfloat16 and compiled steps where there is one, else the CPU as it is."""
        if torch.cuda.is_available():
            return cls("cuda", "bf16", compile=True)
        return cls()

    @property
    def name(self) -> str:
        """The device as a reader knows it."""
        cuda = self.device.startswith("cuda")
        return torch.cuda.get_device_name(self.device) if cuda else f"CPU, {self.threads} thread"

    def prepare(self) -> torch.device:
        """Set this process up; call it once in each."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        return torch.device(self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 has the range of float32: there is no GradScaler."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")
