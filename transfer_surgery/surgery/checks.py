"""Whether a model can be converted, or has been baked; asked before anything is changed."""

from __future__ import annotations

import contextlib
import itertools

from torch import nn
from torch.nn.parameter import is_lazy

from transfer_surgery.sites import Plan
from transfer_surgery.units import GatedActivation

# By name: importing torch.distributed.fsdp to compare classes would take longer than `convert`.
_WRAPPERS = {
    "ScriptModule": "convert the model before torch.jit.script or torch.jit.trace",
    "OptimizedModule": "convert the model before torch.compile",
    "DistributedDataParallel": "convert the model before wrapping it in DistributedDataParallel",
    "DataParallel": "convert the model before wrapping it in DataParallel",
    "FullyShardedDataParallel": "convert the model before wrapping it in FSDP",
    "FSDPModule": "convert the model before fully_shard",
}


def check_model(model: nn.Module) -> None:
    """Raise where surgery would do harm, or would have no effect.

    Raises:
        TypeError: no eager module: scripted, compiled, traced or wrapped for distribution.
        ValueError: converted before, or with parameters that have no values yet.
    """
    for path, module in model.named_modules():
        where = path or "the model"
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
                raise TypeError(f"{where} is a {type(module).__name__}: {_WRAPPERS[cls.__name__]}.")
        if module._compiled_call_impl is not None:
            raise TypeError(
                f"{where} is compiled in place: convert the model before calling compile() on it."
            )
        if isinstance(module, GatedActivation):
            raise ValueError(
                f"{where} is gated already: the model was converted before. Call revert(model) "
                "first, or convert once with all sites."
            )
        _check_values(where, module)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise where a plan is of another model.

    Raises:
        ValueError: a site's caller or activation module is not there, or is of another type.
    """
    for site in plan:
        for path, kind in ((site.caller, site.caller_type), (site.module, site.module_type)):
            found = None
            with contextlib.suppress(AttributeError):
                found = type(model.get_submodule(path or ""))
            if kind is not None and found is not kind:
                raise ValueError(
                    f"the plan is of another model: it has a {kind.__name__} at {path!r}, this "
                    f"{type(model).__name__} has none. Call find_activations with this model."
                )


def check_no_gates(model: nn.Module) -> None:
    """Raise where a model has not been baked.

    Raises:
        ValueError: it has gates.
    """
    gated = [path for path, m in model.named_modules() if isinstance(m, GatedActivation)]
    if gated:
        raise ValueError(
            f"{type(model).__name__} still has gates at {len(gated)} sites, such as "
            f"{gated[0]!r}: call bake(model) first."
        )


def check_no_offload(model: nn.Module) -> None:
    """Raise where parameters wait elsewhere until their module is called.

    Raises:
        ValueError: one is on the meta device.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values. If accelerate offloads the "
                "model, bring it back with accelerate.hooks.remove_hook_from_submodules(model), "
                "and offload it afterwards."
            )


def _check_values(where: str, module: nn.Module) -> None:
    """Gates made now would be wiped out when the parameters get their values."""
    own = itertools.chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    )
    for name, tensor in own:
        if is_lazy(tensor):
            raise ValueError(
                f"{where}: {name} has no shape yet. Run the model once on real input (that "
                "initialises lazy modules), then convert it."
            )
        if tensor.is_meta:
            raise ValueError(
                f"{where}: {name} is on the meta device and has no values. Materialise the model "
                "first (to_empty, then load its weights), then convert it."
            )
