"""Activations of torch that are listed in a plan with the reason, and never converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_FUSED = "it is inside a fused kernel, which takes no other activation"
LISTED: dict[Callable[..., Any], tuple[str, str]] = {
    **dict.fromkeys((F.rrelu, torch.rrelu), ("rrelu", "its slope is random")),
    F.glu: ("glu", "it multiplies two halves of its input"),
    torch.lstm: ("lstm", _FUSED),
    torch.gru: ("gru", _FUSED),
    torch.rnn_tanh: ("rnn_tanh", _FUSED),
    torch.rnn_relu: ("rnn_relu", _FUSED),
    torch.lstm_cell: ("lstm_cell", _FUSED),
    torch.gru_cell: ("gru_cell", _FUSED),
    torch.rnn_tanh_cell: ("rnn_tanh_cell", _FUSED),
    torch.rnn_relu_cell: ("rnn_relu_cell", _FUSED),
}
"""By function: the name in a plan, and the reason."""
LISTED_NAMES = {name for name, _ in LISTED.values()}
