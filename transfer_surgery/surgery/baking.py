"""bake: freeze the eval gates into plain modules, without gates and ready to export."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from transfer_surgery._float32 import Float32Module
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.activations import Activation, ActivationModule, activation_module
from transfer_surgery.surgery.insertion import answer_for, share_hooks, swap_children
from transfer_surgery.units import (
    FittedActivation,
    GatedActivation,
    Granularity,
    TargetParameters,
    gated,
    gated_activations,
    recompute_activations,
)


class MixedActivation(Float32Module):
    """Source where the fixed mask ``z`` is 1, target where it is 0, Eq. 1 between.

    Args:
        source: activation where ``z`` is 1.
        target: activation where ``z`` is 0.
        z: gates in [0, 1], float32, of the shape that the granularity asks for.
        granularity: which elements of the input share a gate.
        fitted: parameters of a target ``a * target(w*x + c) + b``; None: the target as it is.
    """

    z: Tensor

    def __init__(
        self,
        source: Activation,
        target: Activation,
        z: Tensor,
        granularity: Granularity,
        fitted: TargetParameters | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target, self.granularity = source, target, granularity
        self.register_buffer("z", z)
        self.fitted = fitted

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        z = self.granularity.expand(self.z, input)
        numbers = None if self.fitted is None else self.fitted(input)
        return gated(input, z, self.source, self.target, operands=operands, numbers=numbers)

    def extra_repr(self) -> str:
        return f"{self.source} -> {self.target}, {float(self.z.mean()):.0%} {self.source}"


class _Overwriting(nn.Module):
    """Writes an activation's result back to its input, as the original in-place call did."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, *operands: Tensor) -> Tensor:
        return input.copy_(self.activation(input.clone(), *operands))


@torch.no_grad()
def bake(model: nn.Module, harden: bool = False) -> nn.Module:
    """Replace every gated unit by what it computes in eval mode, in place.

    A site whose gates are all 1 gets its original activation back. One whose gates are all 0
    becomes the target activation: torch's own module where there is one, with its fitted numbers
    where it was matched. Any other becomes a
    `MixedActivation`. Outputs equal the eval outputs of the gated model: bit for bit where all
    gates are 0 or 1, to rounding otherwise. The baked model computes the same in training mode:
    nothing is sampled any more. `fold_targets` then moves fitted numbers into the layers around.

    Args:
        model: a converted model.
        harden: round gates between 0 and 1 first (0.5 becomes 0); this changes the outputs.

    Returns:
        The same model object.

    Raises:
        ValueError: the model is not converted, or a gate is NaN. The model is then unchanged.
        TypeError: the model is sharded by FSDP2; the message says what to do.

    Examples:
        >>> from transfer_surgery import convert
        >>> model = convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 4))
        >>> _ = model[0].log_alpha.data.fill_(-8.0)
        >>> bake(model)
        Sequential(
          (0): ActivationModule(sin)
        )
    """
    check_not_sharded(model)
    baked: dict[nn.Module, nn.Module] = {}
    originals: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for path, unit in gated_activations(model):
        originals[unit] = unit.replaced
        baked[unit] = plain_module(unit, final_gates(path, unit, harden))
    for gated_unit, module in baked.items():
        module.train(gated_unit.training)
        share_hooks(gated_unit, module)
        for original in originals[gated_unit]:
            if original is not module:
                answer_for(original, module)
    swap_children(model, baked)
    recompute_activations(model, enabled=False)
    return model


def final_gates(path: str, unit: GatedActivation, harden: bool) -> Tensor:
    """The gates of a unit in eval mode, between 0 and 1, in the unit's shape of gates.

    Args:
        path: where the unit lives, for the message.
        unit: the unit; it is not changed.
        harden: round gates between 0 and 1 (0.5 becomes 0).

    Raises:
        ValueError: a gate is NaN.
    """
    z = unit.gate.predict().detach()
    # Some kinds of gates round what they hold, and NaN would be 0 then.
    if any(value.isnan().any() for value in (z, *unit.gate.state_dict().values())):
        raise ValueError(
            f"{path}: its gates have values that are not a number. Go back to a checkpoint in "
            "which they are finite."
        )
    return (z > 0.5).to(z.dtype) if harden else z


def outcome_of(z: Tensor) -> Literal["source", "target", "mixed"]:
    """What a site with these gates computes once they are frozen."""
    if bool((z == 1).all()):
        return "source"
    return "target" if bool((z == 0).all()) else "mixed"


def plain_module(unit: GatedActivation, z: Tensor) -> nn.Module:
    """What a unit computes where its gates have these values, as a module without gates."""
    outcome = outcome_of(z)
    if outcome == "source":
        if unit.replaced:
            (original,) = unit.replaced
            # One that stood at other places too has other hooks than this unit.
            is_own = original._forward_hooks is unit._forward_hooks
            return original if is_own else copy.copy(original)
        plain = plain_activation(unit.source, bool(unit.source.operands))
    elif outcome == "target":
        if unit.fitted is not None:
            plain = FittedActivation(unit.target, unit.fitted, bool(unit.source.operands))
        else:
            plain = plain_activation(unit.target, bool(unit.source.operands))
    else:
        z = z.clone()
        plain = MixedActivation(unit.source, unit.target, z, unit.granularity, unit.fitted)
    return _Overwriting(plain) if unit.overwrites_input else plain


def plain_activation(activation: Activation, takes_operands: bool) -> nn.Module:
    """The module of an activation at a site; torch's own take nothing but their input."""
    return ActivationModule(activation) if takes_operands else activation_module(activation)
