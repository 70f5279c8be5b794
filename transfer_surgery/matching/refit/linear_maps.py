"""Linear and convolutional layers as matrices: rows of inputs, and the weights that multiply them.

Each element of an output is a row times a column of weights. For a convolution the row is a patch
of the padded input. A transposed convolution is one of stride 1 over an input with zeros between
its elements. The groups of a convolution are systems of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_surgery.matching.fitting.sample import Positions, draw_positions

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


class LinearMap:
    """A layer of one of these classes, read as ``y = W x + d`` at each position of its output.

    Args:
        layer: the layer.

    Examples:
        >>> layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 5, 5)
        >>> y, matrix = layer(x) - layer.bias.view(6, 1, 1), LinearMap(layer)
        >>> rows, weights = matrix.rows(x, y.shape, None), matrix.weights()
        >>> rows.shape, weights.shape  # groups, positions or inputs, inputs or outputs
        (torch.Size([2, 50, 18]), torch.Size([2, 18, 3]))
        >>> torch.allclose(rows @ weights, matrix.outputs(y, None), atol=1e-5)
        True
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._spatial = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        self._transposed = isinstance(layer, TRANSPOSED)
        self.groups: int = getattr(layer, "groups", 1)
        outputs = layer.weight.shape[0] // self.groups
        if self._transposed:
            outputs = layer.weight.shape[1]
        self.n_outputs: int = outputs
        self.n_inputs: int = layer.weight.numel() // (outputs * self.groups)

    def weights(self) -> Tensor:
        """``(groups, inputs, outputs)``."""
        weight: Tensor = self._layer.weight.detach()
        if self._transposed:  # (inputs, outputs of a group, kernel)
            per_group = _by_group(weight, 0, self.groups).flip(self._kernel_axes(1))
            return per_group.movedim(2, -1).flatten(1, -2)
        return _by_group(weight, 0, self.groups).flatten(2).transpose(1, 2)

    def weight_of(self, weights: Tensor) -> Tensor:
        """The layer's weight, in its shape, from weights as `weights` gives them."""
        shape = self._layer.weight.shape
        if self._transposed:
            per_group = weights.reshape(self.groups, -1, *shape[2:], self.n_outputs).movedim(-1, 2)
            return per_group.flip(self._kernel_axes(1)).reshape(shape)
        return weights.transpose(1, 2).reshape(shape)

    def _kernel_axes(self, before: int) -> list[int]:
        return [before + 2 + axis for axis in range(self._spatial)]

    def positions(self, shape: Sequence[int], count: int, seed: int) -> Positions:
        """At most so many positions of an output of this shape, at random."""
        if not self._spatial:
            return draw_positions(shape[:-1], count, seed)
        examples = shape[0] if len(shape) == self._spatial + 2 else 1
        return draw_positions((examples, *shape[-self._spatial :]), count, seed)

    def outputs(self, y: Tensor, positions: Positions) -> Tensor:
        """A copy of the outputs at some positions, as ``(groups, positions, outputs)``."""
        y = y.detach()
        if self._spatial:
            y = (y if y.dim() == self._spatial + 2 else y[None]).movedim(1, -1)
        taken = (y if positions is None else y[positions]).reshape(-1, y.shape[-1]).clone()
        return _by_group(_wide(taken), 1, self.groups).transpose(0, 1)

    def rows(self, x: Tensor, shape: Sequence[int], positions: Positions) -> Tensor:
        """What the outputs at some positions are made of, as ``(groups, positions, inputs)``.

        Args:
            x: an input.
            shape: of the output for it.
            positions: None: all of them.
        """
        x = _wide(x.detach())
        if not self._spatial:
            taken = x if positions is None else x[positions]
            return taken.reshape(1, -1, x.shape[-1])
        space = tuple(shape[-self._spatial :])
        windows = self._windows(x if x.dim() == self._spatial + 2 else x[None], space)
        taken = windows.flatten(0, self._spatial) if positions is None else windows[positions]
        return _by_group(taken.movedim(-1, 1), 1, self.groups).flatten(2).transpose(0, 1)

    def _windows(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        """A view ``(N, positions ..., kernel ..., channels)`` of the padded input.

        The channels of a pixel lie side by side: so windows are copied several times as fast.
        """
        layer = self._layer
        stride = layer.stride
        if self._transposed:
            x, stride = self._spread(x, space), (1,) * self._spatial
        elif layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
        else:
            x = F.pad(x, self._zeros())
        x = x.movedim(1, -1).contiguous()
        step = x.stride()[1:-1]
        return x.as_strided(
            (x.shape[0], *space, *layer.kernel_size, x.shape[-1]),
            (
                x.stride(0),
                *(a * b for a, b in zip(step, stride, strict=True)),
                *(a * b for a, b in zip(step, layer.dilation, strict=True)),
                1,
            ),
        )

    def _zeros(self) -> list[int]:
        """What the convolution pads with zeros, as `F.pad` takes it: the last axis first."""
        layer, pad = self._layer, []
        for axis in reversed(range(self._spatial)):
            if isinstance(layer.padding, str):
                total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
                total *= layer.padding == "same"
                pad += [total // 2, total - total // 2]
            else:
                pad += [layer.padding[axis]] * 2
        return pad

    def _spread(self, x: Tensor, space: tuple[int, ...]) -> Tensor:
        """The input of a transposed convolution with zeros between and around its elements."""
        layer, pad = self._layer, []
        for axis in range(self._spatial):
            size, stride = list(x.shape), layer.stride[axis]
            size[axis + 2] *= stride
            spread = x.new_zeros(size)
            spread[(slice(None),) * (axis + 2) + (slice(None, None, stride),)] = x
            x = spread
        for axis in reversed(range(self._spatial)):
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            edge = reach - layer.padding[axis]
            # As many behind as make the output as long as it is: its length can be chosen.
            pad += [edge, space[axis] + reach - x.shape[axis + 2] - edge]
        return F.pad(x, pad)


def _by_group(x: Tensor, axis: int, groups: int) -> Tensor:
    """With the axis of the channels split into groups and the channels of a group."""
    return torch.unflatten(x, axis, (groups, -1))


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider, where it is no index."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
