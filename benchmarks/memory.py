"""How many bytes wait for the backward pass, and how many operators run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def waiting_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that were allocated in a forward pass and are still there at its end.

    Args:
        forward: makes a loss; its backward pass is run afterwards.
    """
    with _Allocated() as allocated:
        loss = forward()
        found = allocated.alive()
    loss.backward()  # type: ignore[no-untyped-call]
    return found


class _Allocated(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for storage, size in self.seen.values() if not storage.expired())


class Launches(TorchDispatchMode):
    """Counts the operators that do something, without views, while it is entered.

    Args:
        enabled: False: count nothing, at no cost.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled, self.number = enabled, 0

    def __enter__(self) -> Self:
        return super().__enter__() if self.enabled else self

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        quiet = function.is_view or function.namespace != "aten" or "item" in function.name()
        self.number += not quiet
        return function(*args, **(kwargs or {}))
