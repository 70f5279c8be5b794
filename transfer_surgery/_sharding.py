"""Tensors that FSDP2 shards: gather them for the arithmetic, and write into their shards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_fsdp(module: nn.Module) -> bool:
    """Whether a module is one of ``fully_shard``."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `torch.distributed.tensor.DTensor`, without importing that package."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from its shards; differentiable.

    This is a collective operation: every rank of the tensor's mesh has to call it.
    """
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; it may be empty."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def any_rank(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether a flag is set on any rank that shares one of these tensors.

    This is a collective operation where a tensor is sharded. All ranks have to act on what some of
    them see: if one rank raises, the others would wait for ever.
    """
    meshes = {t.device_mesh for t in tensors if is_sharded(t)}  # type: ignore[attr-defined]
    for mesh in sorted(meshes, key=lambda mesh: mesh.mesh.flatten().tolist()):
        count = torch.full((1,), float(flag), device=mesh.device_type)
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(count, group=mesh.get_group(axis))
        flag = bool(count)
    return flag


def shard_like(values: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of values that are the same on every rank, to be written into `tensor`."""
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=tensor.placements)  # type: ignore[attr-defined]


def check_not_sharded(model: nn.Module) -> None:
    """Raise TypeError where FSDP2 manages the parameters: its modules must not be replaced."""
    for path, module in model.named_modules():
        if is_fsdp(module):
            raise TypeError(
                f"{path or 'the model'} is sharded by fully_shard. Gather its state on every rank "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "StateDictOptions(full_state_dict=True)), load that into a converted model that is "
                "not sharded, and go on with this one."
            )


def reshard(modules: Iterable[Any]) -> None:
    """Make the parameters of FSDP2 modules shards again: an eval forward leaves some gathered.

    What is written into a gathered parameter is lost.
    """
    for module in modules:
        module.reshard()
