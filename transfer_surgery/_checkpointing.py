"""Gradient checkpointing, as those meet it who look at what comes to a module."""

from __future__ import annotations

import sys

import torch
from torch.autograd.function import FunctionCtx


def recomputes() -> bool:
    """Whether a backward pass runs, in which gradient checkpointing runs the network again.

    Torch's own checkpointing asks in the same way (2.11); there is no public way.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_graph_shows(path: str) -> None:
    """Raise where a module runs without gradients since an `autograd.Function` computes them anew.

    Args:
        path: of the module that runs.

    Raises:
        RuntimeError: its outputs have no graph, although it is trained.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        # `Function.forward` has a context as its first argument.
        if frame.f_code.co_name == "forward" and frame.f_code.co_argcount:
            first = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                raise RuntimeError(
                    f"{path} runs inside of an autograd.Function, which hides what comes to it: "
                    "use gradient checkpointing with use_reentrant=False."
                )
