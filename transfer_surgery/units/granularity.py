"""Which elements of an input share a gate."""

from __future__ import annotations

from torch import Tensor


def spread(values: Tensor, x: Tensor, granularity: str, channel_axis: int) -> Tensor:
    """View gates, or what there is one of for each gate, so that they broadcast to ``x``.

    Their shape is ``(1,)``, ``(C,)`` or the feature shape, maybe with an axis of examples in front.
    """
    gate_dims = {"layer": 0, "channel": 1, "neuron": x.dim() - 1}[granularity]
    shape = [1] * x.dim()
    if shape and values.dim() > gate_dims:
        shape[0] = values.shape[0]
    if granularity == "channel":
        shape[channel_axis] = values.shape[-1]
    elif granularity == "neuron":
        shape[1:] = x.shape[1:]
    return values.reshape(shape)
