"""bake: freeze the eval gates into plain modules, without gates and ready to export."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.activations import activation_module
from transfer_surgery.sites import describe_baked, swap_children
from transfer_surgery.surgery.baked_modules import (
    IgnoringOperands,
    MixedActivation,
    MixedOfOperands,
    Overwriting,
    OverwritingOfOperands,
)
from transfer_surgery.surgery.checks import check_no_offload
from transfer_surgery.surgery.insertion import answer_for, share_hooks
from transfer_surgery.units import (
    FittedActivation,
    GatedActivation,
    gated_activations,
    recompute_activations,
)


@torch.inference_mode(False)  # what it makes may be trained
@torch.no_grad()
def bake(model: nn.Module, harden: bool = False) -> nn.Module:
    """Replace every gated unit by what it computes in eval mode, in place.

    A site whose gates are all 1 gets its original activation back. One whose gates are all 0
    becomes the target activation: torch's own module where there is one, with its fitted numbers
    where it was matched. Any other becomes a `MixedActivation`. Outputs equal the eval outputs of
    the gated model: bit for bit where all gates are 0 or 1, to rounding otherwise. The baked model
    computes the same in training mode: nothing is sampled any more. Parameters that stay are the
    same objects: an optimizer made before goes on training them. The ``config`` of a transformers
    model follows where it can name the new activations, such as ``hidden_act="relu"``; elsewhere a
    warning says that ``from_pretrained`` would bring the old ones back. `fold_targets` then moves
    fitted numbers into the layers around.

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
    check_arguments(bake, locals())
    check_not_sharded(model)
    baked: dict[nn.Module, nn.Module] = {}
    originals: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for path, unit in gated_activations(model):
        unit.follow_settings()
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
    describe_baked(model)
    return model


def final_gates(path: str, unit: GatedActivation, harden: bool) -> Tensor:
    """The gates of a unit in eval mode, between 0 and 1, in the unit's shape of gates.

    Args:
        path: where the unit lives, for the message.
        unit: the unit; it is not changed.
        harden: round gates between 0 and 1 (0.5 becomes 0).

    Raises:
        ValueError: a gate is NaN, or offloaded.
    """
    check_no_offload(unit)
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
    outcome, takes = outcome_of(z), bool(unit.source.operands)
    dims = 2 if unit.dims is None else unit.dims
    if outcome == "source":
        if unit.replaced:
            (original,) = unit.replaced
            # One that stood at other places too has other hooks than this unit.
            is_own = original._forward_hooks is unit._forward_hooks
            return original if is_own else copy.copy(original)
        plain = activation_module(unit.source)
    elif outcome == "target":
        plain = IgnoringOperands(_target(unit, dims)) if takes else _target(unit, dims)
    else:
        trailing = unit.granularity.trailing(dims)
        kind = MixedOfOperands if takes else MixedActivation
        plain = kind(activation_module(unit.source), _target(unit, dims), z.clone(), trailing)
    if not unit.overwrites_input:
        return plain
    return OverwritingOfOperands(plain) if takes else Overwriting(plain)


def _target(unit: GatedActivation, dims: int) -> nn.Module:
    """The target as a module, with the very parameters that the unit has."""
    plain = activation_module(unit.target)
    return plain if unit.fitted is None else FittedActivation(plain, unit.fitted, dims)
