"""The finder: run a stand-in of the model once per training mode and write down its activations.

A `TorchFunctionMode` sees every torch call, hooks keep the stack of modules. A module that does
nothing but one activation (``nn.ReLU``, timm's own classes, anybody's) counts as a call of its
caller. Nothing of the model is touched and, on fake tensors, nothing is computed.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from transfer_surgery._arguments import check_arguments
from transfer_surgery.sites.caller import check_edits
from transfer_surgery.sites.frames import is_users
from transfer_surgery.sites.graph import GraphRoute
from transfer_surgery.sites.observation import Observation
from transfer_surgery.sites.observer import Observer
from transfer_surgery.sites.plan import Plan
from transfer_surgery.sites.route import Expression, Route
from transfer_surgery.sites.site import CallerCode, Site
from transfer_surgery.sites.source import Function
from transfer_surgery.sites.stand_in import (
    Uncopyable,
    example_arguments,
    fake_arguments,
    probe_copy,
    undisturbed,
)
from transfer_surgery.sites.unseen import unseen_calls
from transfer_surgery.sites.zoo import adapt_sites, find_example_input

_WAYS = {Route: "edit", GraphRoute: "fx", type(None): "intercept"}


def find_activations(
    model: nn.Module, example_input: Any = None, *, modes: Sequence[str] = ("eval", "train")
) -> Plan:
    """List every activation call of a model, which is not changed.

    Args:
        model: any module.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments. Only shapes,
            dtypes and non-tensor values matter. By default the zoo's adapter supplies it.
        modes: the training modes to examine; sites of auxiliary heads run in ``"train"`` only.

    Returns:
        The plan; print it to see a table.

    Raises:
        ValueError: there is no example input, or the model does not run on it.
        TypeError: the model cannot be deep-copied.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = find_activations(model, torch.zeros(1, 4))
        >>> [(site.path, str(site.source), site.shape) for site in plan]
        [('1', 'relu', (2, 8))]
    """
    check_arguments(find_activations, locals())
    arguments = example_arguments(
        find_example_input(model) if example_input is None else example_input
    )
    observations, failures = _observe(model, arguments, modes)
    return _plan(model, observations, failures)


def _observe(
    model: nn.Module, arguments: Any, modes: Sequence[str]
) -> tuple[dict[str, Observation], list[str]]:
    """Run a probe in each mode, each in the first way in which the model runs.

    Returns:
        What was seen in each mode, and why the model does not run in the others.
    """
    observations: dict[str, Observation] = {}
    failures, error = [], None
    for mode in modes:
        result = _run(model, arguments, mode)
        if isinstance(result, Observation):
            observations[mode] = result
        else:
            error = result
            failures.append(
                f"{mode} mode could not be examined, so what runs in it alone has no gates "
                f"({type(error).__name__}: {_first_line(error)})"
            )
    if not observations and error is not None:
        raise ValueError(
            f"{type(model).__name__} does not run on the example input{_where(error)} "
            f"({type(error).__name__}: {_first_line(error)}). Check that model(...) runs with it; "
            "pass another example_input=: a tensor, a tuple of positional arguments or a dict of "
            "keyword arguments."
        ) from error
    return observations, failures


def _run(model: nn.Module, arguments: Any, mode: str) -> Observation | Exception:
    """Examine one mode: on fake tensors, or for real where values steer the model.

    Without gradients and hooks of others where the model does not need them, and with a single
    example as two.

    Returns:
        What was seen, or why the model does not run on its own example.
    """
    error: Exception | None = None
    yes_no, no_yes = (True, False), (False, True)
    for hooks, gradients, is_fake, double in itertools.product(no_yes, no_yes, yes_no, yes_no):
        fake = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else None
        try:
            probe = probe_copy(model, fake, hooks).train(mode == "train")
            args, kwargs = fake_arguments(arguments, fake, double)
            with undisturbed(fake is not None):
                return Observer(probe).run(args, kwargs, fake, gradients)
        except Uncopyable:
            raise
        except Exception as failed:
            error = failed
    assert error is not None
    return error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _where(error: Exception) -> str:
    """The line of the model's own code that failed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _plan(model: nn.Module, observations: dict[str, Observation], failures: list[str]) -> Plan:
    merged: dict[tuple[str, Any], dict[str, Any]] = {}
    for mode, observation in observations.items():
        for event in observation.sites():
            fields = merged.setdefault((event.caller, event.key), event.fields() | {"modes": ()})
            fields["modes"] += (mode,)
            fields["calls"] = max(fields["calls"], event.calls)
            fields["overwrites_input"] |= event.overwrites_input
            fields["input_changes"] |= event.fields()["input_changes"]
            fields["reason"] = fields["reason"] or event.reason
    walked = set[str]().union(*(one.walked for one in observations.values()))
    _assign_ways(model, merged, walked)
    calls = _caller_codes(observations, merged)
    sites = [
        Site(
            caller=caller,
            key=key,
            caller_type=type(model.get_submodule(caller)),
            module_type=None if f["module"] is None else type(model.get_submodule(f["module"])),
            **f,
        )
        for (caller, key), f in merged.items()
    ]
    sites = check_edits(model, adapt_sites(model, sites), calls)
    scripted = sorted(set[str]().union(*(one.scripted for one in observations.values())))
    notes = [f"{what or 'the model'} is TorchScript: not examined" for what in scripted]
    notes += [
        f"{site.path}: intercepted, because {site.why}"
        for site in sites
        if site.way == "intercept" and site.reason is None
    ]
    return Plan(tuple(sites), tuple(failures), tuple(notes), calls)


def _caller_codes(
    observations: dict[str, Observation], merged: dict[tuple[str, Any], dict[str, Any]]
) -> dict[str, CallerCode]:
    seen = set[Expression]().union(*(one.expressions for one in observations.values()))
    functions: dict[str, set[Function]] = {}
    for (caller, _), f in merged.items():
        if isinstance(f["route"], Route):
            functions.setdefault(caller, set()).update(f["route"].functions)
    unseen = {caller: unseen_calls(several, seen) for caller, several in functions.items()}
    callers = dict.fromkeys(caller for one in observations.values() for caller in one.keys)
    return {
        caller: CallerCode(
            keys={
                m: frozenset(o.keys[caller]) for m, o in observations.items() if caller in o.keys
            },
            modules={
                path: child
                for one in observations.values()
                for path, child in one.modules.get(caller, {}).items()
            },
            unseen=unseen.get(caller, ()),
        )
        for caller in callers
    }


def _assign_ways(
    model: nn.Module, merged: dict[tuple[str, Any], dict[str, Any]], walked: set[str]
) -> None:
    """Decide how each site is redirected and where its unit will live."""
    callers: dict[str, list[tuple[str, Any]]] = {}
    for (caller, key), f in merged.items():
        if f["module"] is not None:
            callers.setdefault(f["module"], []).append((caller, key))
    for (caller, key), f in merged.items():
        sites = callers.get(f["module"], [])
        own = [site for site in sites if site[0] == caller]
        if f["module"] is None:
            base = f["source"].name
        elif len(sites) == 1:
            f["way"], f["path"], f["why"], f["route"] = "child", f["module"], None, None
            continue
        else:
            names = _registered_names(model, caller, f["module"])
            private = len(own) == len(names) and (len(own) == 1 or _runs_in_order(model, caller))
            if private:
                f["way"], f["path"] = "child", _join(caller, names[own.index((caller, key))])
                f["why"], f["route"] = None, None
                continue
            base = names[0] if names else f["module"].rpartition(".")[2]
        if caller in walked:
            f["route"], f["why"] = None, "its code walks over its children"
        f["way"] = _WAYS[type(f["route"])]
        f["path"] = _free_name(model, caller, base, {g.get("path") for g in merged.values()})
        if f["route"] is None and isinstance(model.get_submodule(caller), fx.GraphModule):
            f["reason"] = f["reason"] or f["why"]  # copies of graphs keep what is in the graph


def _registered_names(model: nn.Module, caller: str, module: str) -> list[str]:
    target = model.get_submodule(module)
    return [n for n, child in model.get_submodule(caller)._modules.items() if child is target]


def _runs_in_order(model: nn.Module, caller: str) -> bool:
    return type(model.get_submodule(caller)).forward is nn.Sequential.forward


def _free_name(model: nn.Module, caller: str, base: str, taken: set[str | None]) -> str:
    module, number = model.get_submodule(caller), 0
    # Not hasattr: a __getattr__ may answer to any name.
    held = {*dir(type(module)), *vars(module), *module._modules}
    held |= {*module._parameters, *module._buffers}
    while f"{base}_{number}" in held or _join(caller, f"{base}_{number}") in taken:
        number += 1
    return _join(caller, f"{base}_{number}")


def _join(caller: str, name: str) -> str:
    return f"{caller}.{name}" if caller else name
