"""``torch.autograd.Function`` for small tensors: what a call costs besides its work."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """A function that vmap knows, with the signature of its ``forward`` at hand.

    With a ``setup_context`` torch 2.15 asks `inspect` for the signature at every call, which takes
    longer than a small kernel; `inspect` takes what it finds in ``__signature__``.
    """

    generate_vmap_rule = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
