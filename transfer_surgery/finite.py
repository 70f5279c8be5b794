"""A look at the gradients before a step: a loss that is not finite must not reach the gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery.sharding import is_sharded
from transfer_surgery.unit import gated_activations

__all__ = ["FiniteWatch"]

_LOOK_EVERY = 50  # steps between looks at a device other than the CPU: a look synchronises


class FiniteWatch:
    """Looks at the gradients that a loss which is not finite reaches: biases and norms, and gates.

    At every step on a CPU, at every 50th elsewhere.

    Args:
        optimizer: the optimizer; not kept.
        model: its model.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ours = [(name, p) for name, p in model.named_parameters() if id(p) in held]
        gates = {id(u.log_alpha) for _, u in gated_activations(model) if u.gate.learned}
        vectors = [p for _, p in ours if p.dim() <= 1 and id(p) not in gates]
        self.watched = [
            (name, p) for name, p in ours if not vectors or p.dim() <= 1 or id(p) in gates
        ]
        self.looks = 0

    def check(self, step: int, state: str) -> None:
        """Raise FloatingPointError where a gradient is not finite; `state` says what that means."""
        found = [(n, p.grad) for n, p in self.watched if p.grad is not None and p.grad.numel()]
        on_cpu = all(grad.device.type == "cpu" for _, grad in found)
        first = self.looks == 0
        self.looks += 1
        if not found or not (on_cpu or (self.looks - 1) % _LOOK_EVERY == 0):
            return
        # The largest element rather than a sum of squares, which overflows where no element does.
        norms = [norm.to(found[0][1].device) for norm in _largest([grad for _, grad in found])]
        finite = torch.stack(norms).isfinite()
        if _everywhere(bool(finite.all()), found[0][1]):
            return
        if not on_cpu and not first:
            state = f"the last look was {_LOOK_EVERY} steps ago: go back to a checkpoint before it"
        bad = [name for (name, _), good in zip(found, finite.tolist(), strict=True) if not good]
        raise FloatingPointError(
            f"optimizer step {step}: the gradient of {bad[0] if bad else 'another rank'} is not "
            f"finite ({state}). Lower the learning rate or clip gradients, use a GradScaler with "
            "float16, lower gamma, or give the TransferSchedule more steps."
        )


def _largest(grads: list[Tensor]) -> list[Tensor]:
    local = [grad.to_local() if is_sharded(grad) else grad for grad in grads]  # type: ignore[attr-defined]
    # A shard may be empty, and has no largest element then.
    return torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in local], math.inf)  # type: ignore[return-value]


def _everywhere(finite: bool, grad: Tensor) -> bool:
    """Whether it is so on every rank that shares sharded gradients: all of them must stop, or none.

    Ranks of DDP have the same gradients by now.
    """
    if not is_sharded(grad):
        return finite
    from torch.distributed.tensor import DTensor, Partial

    mesh = grad.device_mesh  # type: ignore[attr-defined]
    bad = torch.full((1,), float(not finite), device=grad.device)
    total = DTensor.from_local(bad, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor()
    return not bool(total.any())
