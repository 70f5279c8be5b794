"""The module at a call site: source and target activation with the gates between them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from transfer_surgery.activations import Activation
from transfer_surgery.gates import Gate
from transfer_surgery.kernels import gated

__all__ = ["GRANULARITIES", "GatedActivation", "gated_activations", "spread_gates"]

GRANULARITIES = ("layer", "channel", "neuron")


class GatedActivation(nn.Module):
    """``z * source(x) + (1 - z) * target(x)`` (Eq. 1): sampled gates in training, Eq. 16 in eval.

    Args:
        source: the activation that the network had.
        target: the activation it is transferred to.
        gate: the gates, of shape ``(1,)``, ``(C,)`` or the feature shape.
        granularity: ``"layer"``, ``"channel"`` or ``"neuron"``.
        channel_axis: axis of the channels in the input; used with ``"channel"`` only.
        neurons: elements of the feature shape (per example), for reports and risk weights.
        path: where the unit lives, for messages.
        overwrites_input: the original worked in place and its input is read again later; the
            result is then written back to the input.
        depth: its place in the order in which the model's activations run.
        stage: the part of the model that it belongs to, such as ``"layer1"``.

    Example:
        >>> import torch
        >>> from transfer_surgery.activations import get_activation
        >>> from transfer_surgery.gates import make_gate
        >>> unit = GatedActivation(
        ...     get_activation("relu"),
        ...     get_activation("sin"),
        ...     make_gate("hard_concrete", (3,)),
        ...     granularity="channel",
        ...     channel_axis=1,
        ...     neurons=3,
        ... ).eval()
        >>> unit(torch.tensor([[-1.0, 0.0, 2.0]])).detach()
        tensor([[0., 0., 2.]])
    """

    def __init__(
        self,
        source: Activation,
        target: Activation,
        gate: Gate,
        *,
        granularity: str,
        channel_axis: int = 1,
        neurons: int = 1,
        path: str = "",
        overwrites_input: bool = False,
        depth: int = 0,
        stage: str = "",
    ) -> None:
        super().__init__()
        if target.operands:
            raise ValueError(
                f"{path}: {target} takes {', '.join(target.operands)} from the call site of a "
                "network that has it; it can be a source, not a target."
            )
        self.source, self.target, self.gate = source, target, gate
        self.granularity, self.channel_axis = granularity, channel_axis
        self.neurons, self.path, self.overwrites_input = neurons, path, overwrites_input
        self.depth, self.stage = depth, stage
        # The module that this unit stands in for, in a tuple: it is no child of the unit.
        self.replaced: tuple[nn.Module, ...] = ()

    @property
    def log_alpha(self) -> nn.Parameter:
        """The gates' locations; AttributeError for gates without parameters (line, copy)."""
        return self.gate.log_alpha

    def forward(self, x: Tensor, *operands: Tensor) -> Tensor:
        z = self.gate.sample(x.shape[0]) if self.training else self.gate.predict()
        self._expect_size(x)
        z = spread_gates(z, x, self.granularity, self.channel_axis)
        if not self.overwrites_input:
            return gated(x, z, self.source, self.target, self.gate.straight_through, operands)
        y = gated(x.clone(), z, self.source, self.target, self.gate.straight_through, operands)
        return x.copy_(y)

    def _expect_size(self, x: Tensor) -> None:
        if self.granularity == "layer":
            return
        channels = self.granularity == "channel"
        axis = self.channel_axis
        found = tuple(x.shape[axis : axis + 1 or None] if channels else x.shape[1:])
        if found != self.gate.shape:
            alternative = "" if channels else ", or use granularity='channel'"
            raise ValueError(
                f"{self.path}: gates were made for {'channels' if channels else 'neurons'} "
                f"{self.gate.shape}, the input has {found}. Fix: convert with an example_input of "
                f"this size{alternative}."
            )

    def extra_repr(self) -> str:
        return f"{self.source} -> {self.target}, {self.granularity}"


def spread_gates(z: Tensor, x: Tensor, granularity: str, channel_axis: int) -> Tensor:
    """View gates so that they broadcast to ``x``.

    Their shape is ``(1,)``, ``(C,)`` or the feature shape, maybe with an axis of examples in front.
    """
    gate_dims = {"layer": 0, "channel": 1, "neuron": x.dim() - 1}[granularity]
    shape = [1] * x.dim()
    if shape and z.dim() > gate_dims:
        shape[0] = z.shape[0]
    if granularity == "channel":
        shape[channel_axis] = z.shape[-1]
    elif granularity == "neuron":
        shape[1:] = x.shape[1:]
    return z.reshape(shape)


def gated_activations(model: nn.Module) -> Iterator[tuple[str, GatedActivation]]:
    """Yield ``(path, unit)`` for each gated activation of a model, each unit once.

    Raises:
        ValueError: the model has none, that is, it was not converted.
    """
    found = False
    for path, module in model.named_modules():
        if isinstance(module, GatedActivation):
            found = True
            yield path, module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated activations: call convert(model, ...) first."
        )
