"""Weights of a layer that make up for a changed input, by least squares: no training, no labels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 2**24
"""Elements of the unfolded input that are worked on at a time: 64 MB."""


def can_be_refitted(module: nn.Module) -> bool:
    """Whether a module is a linear layer or an ordinary convolution, not grouped, zero padded."""
    if type(module) is nn.Linear:
        return True
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def sharing_weights(layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Layers whose weight another one has too: what suits one does not suit the other."""
    by_weight: dict[Tensor, list[nn.Module]] = {}
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        by_weight.setdefault(weight, []).append(layer)
    return {layer for group in by_weight.values() if len(group) > 1 for layer in group}


def norms_behind(
    model: nn.Module, layers: Iterable[nn.Module], run: Callable[[], Any]
) -> dict[nn.Module, nn.Module]:
    """The batch norm that reads the output of a layer, where both are called once.

    Args:
        model: what has them.
        layers: some of its modules.
        run: calls it.
    """
    outputs: dict[nn.Module, list[weakref.ref[Tensor]]] = {layer: [] for layer in layers}
    inputs: dict[nn.Module, list[nn.Module | None]] = {}

    def read(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        writers = [layer for layer, seen in outputs.items() if seen and seen[-1]() is args[0]]
        inputs[norm].append(writers[0] if writers else None)

    handles = [
        layer.register_forward_hook(lambda m, _, output: outputs[m].append(weakref.ref(output)))
        for layer in outputs
    ]
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            inputs[norm] = []
            handles.append(norm.register_forward_pre_hook(read))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    once = {norm: writers[0] for norm, writers in inputs.items() if len(writers) == 1}
    return {layer: norm for norm, layer in once.items() if layer and len(outputs[layer]) == 1}


class LayerFit:
    """``min |W' x' + d - W x|^2 + ridge * |W' - W|^2`` over batches, ``x`` the original input.

    Products are summed in float64.

    Args:
        layer: one that `can_be_refitted`.
        ridge: as a share of the mean square of the inputs.
        intercept: fit ``d`` of a layer without a bias, for a batch norm behind it to take over; a
            layer with a bias gets another one anyway.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer, x = nn.Linear(3, 2), torch.randn(100, 3)
        >>> fit = LayerFit(layer, ridge=1e-6)
        >>> fit.add(2 * x, layer(x))
        >>> torch.allclose(fit.solve()["weight"], layer.weight / 2, atol=1e-3)
        True
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, ridge: float, intercept: bool = False) -> None:
        self.layer, self.ridge = layer, ridge
        self.shifted = intercept or layer.bias is not None
        rows = [layer.weight.detach().flatten(1).T]
        if layer.bias is not None:
            rows.append(layer.bias.detach()[None])
        elif intercept:
            rows.append(torch.zeros_like(rows[0][:1]))
        self.before = torch.cat(rows).double()
        """Weights as (inputs, outputs), the last row being the bias where there is to be one."""
        self.matrix = self.before.new_zeros(len(self.before), len(self.before))
        self.vector = torch.zeros_like(self.before)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count a batch.

        Args:
            x: what the layer gets now.
            y: what it made of its original input.
        """
        one = max(self.matrix.shape[0] * (y[0].numel() // y.shape[self._axis]), 1)
        length = max(_CHUNK // one, 1)
        for part, wanted in zip(torch.split(x, length), torch.split(y, length), strict=True):
            rows = self._rows(part)
            if self.shifted:
                rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            wanted = wanted.movedim(self._axis, -1).flatten(0, -2).to(rows)
            self.matrix += (rows.T @ rows).double()
            self.vector += (rows.T @ wanted).double()

    @property
    def _axis(self) -> int:
        return 1 if isinstance(self.layer, nn.Conv2d) else -1

    def _rows(self, x: Tensor) -> Tensor:
        """One row per output position: the inputs that it is made of."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x.flatten(0, -2)
        assert not isinstance(layer.padding, str)
        geometry = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return F.unfold(x, *geometry).transpose(1, 2).flatten(0, 1)

    def solve(self) -> dict[str, Tensor]:
        """Weight and, where there is to be one, bias, of their shapes and dtype."""
        inputs = self.layer.weight[0].numel()
        share = self.matrix.diagonal()[:inputs].mean().clamp_min(1e-12)  # 0: all inputs are 0
        pull = torch.full_like(self.matrix[0], 1e-9) * share
        pull[:inputs] += self.ridge * share
        found = torch.linalg.solve(
            self.matrix + torch.diag(pull), self.vector + pull[:, None] * self.before
        )
        like = self.layer.weight
        result = {"weight": found[:inputs].T.reshape(like.shape).to(like).contiguous()}
        if self.shifted:
            result["bias"] = found[inputs].to(like)
        return result
