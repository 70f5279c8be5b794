"""The fused path of ``nn.TransformerEncoderLayer``, which would bypass gates.

In eval mode without gradients the layer hands its weights to one kernel that has relu or gelu built
in, chosen by ``activation_relu_or_gelu``, and ``nn.TransformerEncoder`` packs padded batches into
nested tensors, which that kernel alone understands. Both have an attribute that turns this off.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_ASIDE = "_transfer_surgery_aside"


def close_fused_paths(model: nn.Module, callers: Iterable[nn.Module]) -> None:
    """Turn fused paths off in those callers that have one, and in the encoders around them."""
    layers = {caller for caller in callers if isinstance(caller, nn.TransformerEncoderLayer)}
    for layer in layers:
        _set_aside(layer, "activation_relu_or_gelu", 0)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and layers & set(encoder.layers):
            _set_aside(encoder, "use_nested_tensor", False)


def reopen_fused_paths(model: nn.Module) -> None:
    """Give the attributes back that `close_fused_paths` changed."""
    for module in model.modules():
        vars(module).update(vars(module).pop(_ASIDE, {}))


def _set_aside(module: nn.Module, name: str, value: int) -> None:
    if name in vars(module):  # models pickled by old versions of torch may lack it
        vars(module).setdefault(_ASIDE, {}).setdefault(name, vars(module)[name])
        vars(module)[name] = value
