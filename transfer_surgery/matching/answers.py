"""Read the answers of a classifier out of what a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves


def logits_of(output: Any) -> Tensor:
    """The first floating tensor of an output; of one that names ``logits``, these.

    Raises:
        TypeError: there is none.
    """
    named = output.get("logits") if isinstance(output, Mapping) else None
    for tensor in [named, *tree_leaves(output)]:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor
    raise TypeError(f"the model returns {type(output).__name__} without a floating tensor in it.")


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithms of the probabilities of the classes, one row per answer.

    Args:
        logits: ``(N, classes)``; ``(N, tokens, classes)``; ``(N, classes, height, width)``, and so
            on. A single logit, also of shape ``(N,)``, is read as yes or no: two columns.
        temperature: by which the logits are divided.

    Returns:
        ``(answers, classes)``, in float32 or, where the logits are in it, float64.

    Examples:
        >>> log_probabilities(torch.zeros(2, 3, 4)).shape
        torch.Size([6, 4])
        >>> log_probabilities(torch.zeros(5)).exp()[0]
        tensor([0.5000, 0.5000])
    """
    if logits.dim() < 2:
        logits = logits.reshape(-1, 1)
    classes = -1 if logits.dim() == 3 else 1  # those of a text are last, as in transformers
    rows = logits.movedim(classes, -1).flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if rows.shape[1] == 1:  # a softmax over one class would be 1 whatever the logit
        rows = F.pad(rows, (1, 0))
    return F.log_softmax(rows / temperature, -1)
