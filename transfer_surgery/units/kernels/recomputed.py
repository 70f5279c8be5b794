"""Evaluate a formula and keep its inputs alone: the backward pass evaluates it again.

Autograd keeps an intermediate result of every operation of plain code. A formula that is cheap
compared with the memory it would keep is better evaluated twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_surgery.units.kernels.engine import Formula, engine_for


def recomputed(formula: Formula, *tensors: Tensor) -> Tensor:
    """``formula.plain(*tensors)``, for which autograd keeps nothing but ``tensors``.

    Where `is_transformed` the plain code has to run instead.
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return formula.value(*tensors)
    result: Tensor = _Recomputed.apply(formula, *tensors)
    return result


def values_readable(tensor: Tensor) -> bool:
    """Whether values may steer Python: on a CPU, outside of traces and transforms."""
    if tensor.device.type != "cpu" or is_transformed(tensor):
        return False
    # torch.autograd.grad(is_grads_batched=True) still has batched tensors of the older kind.
    return not torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether something other than eager reverse-mode autograd looks at these tensors.

    A compiler, `torch.jit.trace`, ``make_fx``, a transform of `torch.func`, forward-mode
    derivatives, or a class of tensors of its own, such as fake and sharded ones.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, *tensors: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.engine = engine_for(formula, ctx.needs_input_grad[1:], tensors[0])
        ctx.save_for_backward(*tensors)
        value: Tensor = ctx.engine.value(*tensors)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # second derivatives are asked for
            # Views: where one input was computed from another, their gradients must stay apart.
            views = [t.view_as(t) for t in tensors]
            wanted = [view for view, need in zip(views, needed, strict=True) if need]
            y = ctx.formula.plain(*views)
            found = iter(torch.autograd.grad(y, wanted, grads[0], create_graph=True))
        else:
            found = iter(ctx.engine.gradients(grads[0], *tensors))
        return None, *(next(found) if need else None for need in needed)
