"""Activations of torch that are listed in a plan with the reason, and never converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from transfer_surgery.activations import Activation, Call, recognise

_FUSED = "it is inside a fused kernel, which takes no other activation"
_LISTED: dict[Callable[..., Any], tuple[str, str]] = {
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
LISTED_NAMES = {name for name, _ in _LISTED.values()}


def why_listed(function: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Why a call is none that can be converted, if it is an activation."""
    if function in _LISTED:
        return _LISTED[function][1]
    return None if kwargs.get("out") is None else "it writes its result into out="


def listed_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Such a call as an activation; None where it is none."""
    if function in _LISTED:
        return Call(Activation(_LISTED[function][0]), args[0] if args else None, False)
    return recognise(function, args, {name: v for name, v in kwargs.items() if name != "out"})
