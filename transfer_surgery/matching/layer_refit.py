"""New weights of a layer whose inputs have changed, by least squares."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery._plain_weights import sharing_parameters
from transfer_surgery.matching.least_squares import NormalEquations
from transfer_surgery.matching.two_networks import TwoNetworks
from transfer_surgery.units import GatedActivation

RIDGE = 1e-2
"""What pulls refitted weights to the original ones, as a share of the inputs' mean square."""

_CHUNK = 2**24
"""Elements of the unfolded input that are worked on at a time: 64 MB."""


def layers_to_refit(model: nn.Module) -> tuple[list[nn.Module], dict[nn.Module, str]]:
    """The linear layers that can be refitted; and the others, each with the reason."""
    shared = sharing_parameters(model)
    layers: list[nn.Module] = []
    left: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            if reason := _why_not(module, module in shared):
                left[module] = reason
            else:
                layers.append(module)
    return layers, left


def _why_not(module: nn.Linear | nn.modules.conv._ConvNd, is_shared: bool) -> str | None:
    """Why a layer cannot be refitted, in a few words; None where it can."""
    weight = module._parameters.get("weight")
    if weight is None or module._forward_pre_hooks:
        return "its weight is computed at each call"  # weight norm, pruning
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"a {type(module).__name__}"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if not weight.requires_grad:
        return "frozen"
    if is_shared:
        return "it shares a parameter"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "a grouped convolution"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return "its padding"
    return None


class LayerFit:
    """``min |W' x' + d - W x|^2 + ridge * |W' - W|^2`` over batches, ``x`` the original input.

    Args:
        layer: one of `layers_to_refit`.
        ridge: as a share of the mean square of the inputs.
        offset: fit ``d`` of a layer that has no bias, for a batch norm behind it to take; the
            ``d`` of a layer that has a bias is always fitted.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer, x = nn.Linear(3, 2), torch.randn(100, 3)
        >>> fit = LayerFit(layer, ridge=1e-6)
        >>> fit.add(2 * x, layer(x))
        >>> torch.allclose(fit.solve()["weight"], layer.weight / 2, atol=1e-3)
        True
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, ridge: float, offset: bool = False) -> None:
        self.layer, self.ridge = layer, ridge
        self.offset = offset or layer.bias is not None
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        weight = layer.weight.detach().flatten(1).T
        bias = torch.zeros_like(weight[0]) if layer.bias is None else layer.bias.detach()
        rows = [weight, bias[None]] if self.offset else [weight]
        self.before = torch.cat(rows).double()
        """Weights as (inputs, outputs); the last row is the bias where there is to be one."""
        self.equations = NormalEquations()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count a batch.

        Args:
            x: what the layer gets now.
            y: what it made of its original input.
        """
        one = max(len(self.before) * (y[0].numel() // y.shape[self.axis]), 1)
        length = max(_CHUNK // one, 1)
        for part, wanted in zip(torch.split(x, length), torch.split(y, length), strict=True):
            rows = self._rows(part)
            if self.offset:
                rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            self.equations.add(rows, wanted.movedim(self.axis, -1).flatten(0, -2).to(rows))

    def _rows(self, x: Tensor) -> Tensor:
        """One row per output position: the inputs that this output is made of."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x.flatten(0, -2)
        assert not isinstance(layer.padding, str)
        geometry = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return F.unfold(x, *geometry).transpose(1, 2).flatten(0, 1)

    def solve(self) -> dict[str, Tensor]:
        """The weight, and the bias where there is to be one, in the layer's shapes and dtype."""
        inputs = self.layer.weight[0].numel()
        # All inputs may be 0: the ridge then keeps the weights that the layer has.
        share = self.equations.diagonal()[:inputs].mean().clamp_min(1e-12)
        pull = torch.full_like(self.before[:, 0], 1e-9) * share
        pull[:inputs] += self.ridge * share
        found = self.equations.solve(pull, self.before)
        like = self.layer.weight
        result = {"weight": found[:inputs].T.reshape(like.shape).to(like).contiguous()}
        if self.offset:
            result["bias"] = found[inputs].to(like)
        return result


def refit_layer(
    networks: TwoNetworks,
    layer: nn.Module,
    calls: int,
    transferred: Collection[GatedActivation],
    norm: nn.Module | None,
) -> None:
    """Give a layer the weights that suit the inputs that it gets now.

    Args:
        networks: both networks.
        layer: one of `layers_to_refit`.
        calls: how often it runs on a batch.
        transferred: the sites that are fitted already.
        norm: the batch norm behind it, which takes the offset of a layer without a bias.
    """
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    fit = LayerFit(layer, RIDGE, offset=norm is not None)
    for batch in networks.batches:
        wanted = networks.see(layer, batch, calls)
        here = networks.see(layer, batch, calls, transferred, "now")
        for (x, _), (_, y) in zip(here, wanted, strict=True):
            fit.add(x, y)
    found = fit.solve()
    if norm is not None and layer.bias is None:
        # In training the statistics of the batch do what this does in evaluation.
        mean = norm.running_mean
        assert isinstance(mean, Tensor)
        networks.assign(norm, {"running_mean": mean - found.pop("bias")})
    networks.assign(layer, found)
