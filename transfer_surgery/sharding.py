"""Gates that FSDP2 shards: as whole tensors for the maths, and back into their shards."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_sharded", "like_shard", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`, without importing that package."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from its shards; differentiable.

    Gathering is collective: every rank of the tensor's mesh has to call it.
    """
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def like_shard(values: Tensor, tensor: Tensor) -> Tensor:
    """Values, the same on every rank, as they are to be written into ``tensor``."""
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=tensor.placements)  # type: ignore[attr-defined]
