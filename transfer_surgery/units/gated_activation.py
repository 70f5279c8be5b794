"""The module at a call site: source and target activation with the gates between them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery.activations import Activation
from transfer_surgery.units.fitted_target import AffineParameters
from transfer_surgery.units.gates import Gate
from transfer_surgery.units.granularity import spread
from transfer_surgery.units.kernels import gated
from transfer_surgery.units.recompute import with_recipes

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
        inplace: the original worked in place; in training the result may take the input's memory.
        depth: its place in the order in which the model's activations run.
        stage: the part of the model that it belongs to, such as ``"layer1"``.

    Examples:
        >>> import torch
        >>> from transfer_surgery import get_activation
        >>> from transfer_surgery.units import make_gate
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
        inplace: bool = False,
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
        self.inplace, self.depth, self.stage = inplace, depth, stage
        self.affine: AffineParameters | None = None
        # The module that this unit stands in for, in a tuple: it is no child of the unit.
        self.replaced: tuple[nn.Module, ...] = ()

    def free_target(self) -> AffineParameters:
        """Let the target be ``a * target(w*x + c) + b``, with parameters of the unit.

        They have the shape of the gates and start at the target as it is; the same ones are
        returned where there are some already. See `transfer_surgery.match_targets`.
        """
        if self.affine is None:
            parameters = AffineParameters(self.gate.shape, self.granularity, self.channel_axis)
            device = next(self.gate.parameters(), torch.zeros(())).device
            self.affine = parameters.to(device)
        return self.affine

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A model that was only converted takes the checkpoint of a matched one: the numbers that
        # are in it are parameters from here on, before torch asks the children for theirs.
        if f"{prefix}affine.a" in state_dict:
            self.free_target()
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def log_alpha(self) -> nn.Parameter:
        """The gates' locations; AttributeError for gates without parameters (line, copy)."""
        return self.gate.log_alpha

    def forward(self, x: Tensor, *operands: Tensor) -> Tensor:
        self._expect_size(x)
        given = x.clone() if self.overwrites_input else x
        z = self.gate.sample(x.shape[0]) if self.training else self.gate.predict()
        y = self._gated(given, operands, z)
        return x.copy_(y) if self.overwrites_input else y

    def _gated(self, x: Tensor, operands: tuple[Tensor, ...], z: Tensor) -> Tensor:
        function = partial(
            gated,
            source=self.source,
            target=self.target,
            straight_through=self.gate.straight_through,
            operands=operands,
            numbers=None if self.affine is None else self.affine.of(x),
            in_place=self.training and self.inplace,
        )
        return with_recipes(function, x, spread(z, x, self.granularity, self.channel_axis))

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
        matched = self.affine is not None
        target = f"a * {self.target}(w*x + c) + b" if matched else str(self.target)
        return f"{self.source} -> {target}, {self.granularity}"


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


def stage_of(path: str, unit: GatedActivation) -> str:
    """The stage that a model's adapter named; where none did, the model's child that it is in."""
    return unit.stage or path.split(".")[0]


def matching_units(
    model: nn.Module, include: Any = None, exclude: Any = None
) -> dict[str, GatedActivation]:
    """The gated activations of a model that patterns select, by path.

    Args:
        model: a converted model.
        include: a glob on paths (``"layer1"`` includes all below it), a unit, a predicate on a
            unit, or several of them; None: all.
        exclude: units to leave out, likewise.

    Raises:
        ValueError: the model is not converted, a pattern matches nothing, or nothing is left.
    """
    chosen = dict(gated_activations(model))
    every = dict(chosen)
    for patterns, wanted in ((include, True), (exclude, False)):
        if patterns is None:
            continue
        several = isinstance(patterns, Iterable) and not isinstance(patterns, str | nn.Module)
        hits: set[str] = set()
        for pattern in patterns if several else (patterns,):
            found = {path for path, unit in every.items() if _is_meant(path, unit, pattern)}
            if not found:
                raise ValueError(f"{pattern!r} matches none of the sites {', '.join(every)}.")
            hits |= found
        chosen = {path: unit for path, unit in chosen.items() if (path in hits) == wanted}
    if not chosen:
        raise ValueError(f"no site is left: include={include!r}, exclude={exclude!r}.")
    return chosen


def _is_meant(path: str, unit: GatedActivation, pattern: Any) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")
    return pattern is unit if isinstance(pattern, nn.Module) else bool(pattern(unit))
