"""convert and revert: put gated units into a trained network, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from transfer_surgery._messages import check_arguments, user_stacklevel
from transfer_surgery._sharding import check_not_sharded
from transfer_surgery.activations import Activation, get_target
from transfer_surgery.sites import (
    Plan,
    find_activations,
    prepare_recipes,
    stages_of,
    swap_children,
)
from transfer_surgery.surgery.checks import check_model, check_plan
from transfer_surgery.surgery.encoder_fast_path import reopen_fused_paths
from transfer_surgery.surgery.insertion import insert_units, restore_caller
from transfer_surgery.units import (
    GatedActivation,
    GateSettings,
    Granularity,
    as_patterns,
    gate_settings,
    gated_activations,
    granularity_of,
    kernel_choice,
    make_gate,
    recompute_activations,
)


def convert(
    model: nn.Module,
    target: str | Activation = "sin",
    *,
    source: str | Activation | Iterable[str | Activation] | None = None,
    granularity: str | Granularity | Mapping[str, str | Granularity] = "channel",
    include: Any = None,
    exclude: Any = None,
    roles: Iterable[str] = ("hidden",),
    example_input: Any = None,
    gate: str | GateSettings = "hard_concrete",
    seed: int | None = None,
    plan: Plan | None = None,
) -> nn.Module:
    """Replace the activations of a model by gated units (Eq. 1), in place and all or nothing.

    The outputs in eval mode stay the same bit for bit, unless the gates' ``init`` is ``"alpha"``.
    Class, attributes, methods, hooks, training flags and the entries of ``state_dict()`` stay; the
    gates are added. `match_targets` fits the targets afterwards, `recompute_activations` saves
    memory.

    Args:
        model: any module; zoo models need no ``example_input``.
        target: activation to transfer to, such as ``"sin"`` or ``"snake(a=0.5)"``.
        source: convert these activations only, by name; None: whatever the model has.
        granularity: what has a gate of its own: ``"layer"``, ``"channel"`` or ``"neuron"``, or
            `PerLayer`, `PerChannel`, `PerNeuron`. ``PerChannel(axis)`` overrides the axis that was
            found. Or a mapping from globs on site paths to these, where the first match counts.
        include: convert only these sites: a glob on paths (``"layer1"`` includes all below it), a
            module type (of the caller or the activation), a module of the model (all below it), a
            predicate on `Site`, or several of them.
        exclude: leave these sites alone; the same forms.
        roles: roles to convert: ``"hidden"``, ``"gating"``, ``"output"``, ``"bounding"``.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments.
        gate: how gates are drawn and learned: `HardConcrete`, or a baseline of the paper:
            `Bernoulli`, `Line`, `Copy`. A name such as ``"line"`` stands for the default settings.
        seed: seed of the initial ``log_alpha``; None: torch's current seed. The global random state
            is not advanced.
        plan: a plan from `find_activations`, possibly filtered; it is not searched for again.

    Returns:
        The same model object.

    Raises:
        ValueError: nothing to convert, an unknown name, a pattern that matches nothing, a model
            that is already converted, a plan of another one. The model is then unchanged.
        TypeError: a model that cannot be examined.

    Source: Eq. 1 and section 3.4 of the paper.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> before = model.eval()(x)
        >>> torch.equal(convert(model, target="sin", example_input=x)(x), before)
        True
    """
    check_arguments(convert, locals())
    # Look before anything is changed: the arguments, the model, its sites.
    check_model(model)
    kernel_choice()  # a mistake in the environment would end the first training step
    target, settings = get_target(target), gate_settings(gate)
    include, exclude = (p if p is None else as_patterns(p, model) for p in (include, exclude))
    if plan is not None:
        check_plan(model, plan)
    whole = plan if plan is not None else find_activations(model, example_input)
    for failure in whole.failures:
        warnings.warn(failure, RuntimeWarning, stacklevel=user_stacklevel())
    chosen = whole.select(source=source, include=include, exclude=exclude, roles=roles)
    chosen = chosen.filter(lambda site: site.source != target)
    if not chosen.rows:
        raise ValueError(f"every activation selected is {target} already; choose another target.")
    granularities = _granularities(chosen, granularity)
    # Make a unit for each chosen site.
    stages = stages_of(model, [site.path for site in chosen])
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else int(seed))
    paths = {site.path for site in chosen}
    with torch.inference_mode(False):  # the gates may be trained
        units = {
            site.path: GatedActivation(
                site.source,
                target,
                make_gate(settings, g.gate_shape(site.shape), generator),
                granularity=g,
                neurons=site.neurons,
                path=site.path,
                overwrites_input=site.overwrites_input,
                inplace=site.inplace,
                input_changes=site.input_changes,
                dims=len(site.shape),
                position=position,
                stage=stages[site.path],
                call=whole.call_number(site, paths),
                where=site.where,
            )
            for position, (site, g) in enumerate(zip(chosen, granularities, strict=True))
        }
    for unit in units.values():
        unit.hidden_from = whole.walkers
    # Edit the code that calls them, then put both in.
    recipes = prepare_recipes(model, whole, paths)
    insert_units(model, whole, units, recipes)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: restore the modules, classes and state_dict keys, and remove the gates.

    Returns:
        The same model object.

    Raises:
        ValueError: the model is not converted.
        TypeError: it is sharded by FSDP2; the message says what to do.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> revert(convert(model, example_input=torch.zeros(1, 4)))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    check_arguments(revert, locals())
    check_not_sharded(model)
    originals: dict[nn.Module, nn.Module] = {}
    for _, unit in gated_activations(model):
        if unit.replaced:
            unit.follow_settings()
            originals[unit] = unit.replaced[0]
            originals[unit].train(unit.training)
            originals[unit]._is_full_backward_hook = unit._is_full_backward_hook
    swap_children(model, originals)
    for module in list(model.modules()):
        restore_caller(module)
    reopen_fused_paths(model)
    return recompute_activations(model, enabled=False)


def _granularities(
    plan: Plan, granularity: str | Granularity | Mapping[str, str | Granularity]
) -> list[Granularity]:
    """The granularity of each site.

    Raises:
        ValueError: an unknown name, a glob that matches nothing, a site that no glob matches.
    """
    table = granularity if isinstance(granularity, Mapping) else {"*": granularity}
    for glob, name in table.items():
        granularity_of(name)
        if not any(site.matches(glob) for site in plan):
            raise ValueError(f"granularity pattern {glob!r} matches none of the sites:\n{plan}")
    found = []
    for site in plan:
        wanted = next((name for glob, name in table.items() if site.matches(glob)), None)
        if wanted is None:
            raise ValueError(
                f"{site.path}: no granularity pattern matches it; add '*': 'channel' as the last "
                "one."
            )
        found.append(site.granularity(wanted))
    return found
