"""A look at the gradients before each step: a loss that is not finite must not reach the gates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery._sharding import any_rank, local
from transfer_surgery.units import GatedActivation

_LOOK_EVERY = 50  # steps between looks at a device other than the CPU: a look synchronises


class FiniteWatch:
    """Looks for gradients that are not finite, at every step on a CPU, at every 50th elsewhere.

    It looks at biases, norms and gates, which are small and which such a loss always reaches.

    Args:
        optimizer: the optimizer; not kept.
        model: its model.
        units: the units of the model.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, units: Iterable[GatedActivation]
    ) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gates = {id(unit.log_alpha) for unit in units if unit.gate.learned}
        # By place: the tensors themselves are replaced when a model is sharded later.
        ours = [
            (f"{path}.{name}" if path else name, module, name, p)
            for path, module in model.named_modules()
            for name, p in module._parameters.items()
            if p is not None and id(p) in held
        ]
        vectors = any(p.dim() <= 1 and id(p) not in gates for *_, p in ours)
        self.watched = [
            (path, module, name)
            for path, module, name, p in ours
            if not vectors or p.dim() <= 1 or id(p) in gates
        ]
        self.looks = 0

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        for path, module, name in self.watched:
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.grad is not None:
                yield path, parameter.grad

    def check(self, step: int, state: str) -> None:
        """Raise FloatingPointError where a gradient is not finite; `state` says what that means."""
        found = [(path, grad) for path, grad in self._gradients() if grad.numel()]
        on_cpu = all(grad.device.type == "cpu" for _, grad in found)
        first = self.looks == 0
        self.looks += 1
        if not found or not (on_cpu or (self.looks - 1) % _LOOK_EVERY == 0):
            return
        # The largest element rather than a sum of squares, which overflows where no element does.
        norms = [norm.to(found[0][1].device) for norm in _largest([grad for _, grad in found])]
        finite = torch.stack(norms).isfinite()
        if not any_rank(not bool(finite.all()), [grad for _, grad in found]):
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
    parts = [local(grad) for grad in grads]
    # A shard may be empty, and has no largest element then.
    norms = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in parts], math.inf)
    return list(norms)
