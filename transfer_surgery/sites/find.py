"""The finder: run a stand-in of the model in each training mode and write down its activations.

A `TorchFunctionMode` sees every torch call, hooks keep the stack of modules. A module that does
nothing but one activation (``nn.ReLU``, timm's own classes, anybody's) counts as a call of its
caller. Nothing of the model is touched. Fake tensors, with which no numbers are computed, come
first; where the model does not run on them, it runs for real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.sites.arguments import example_arguments
from transfer_surgery.sites.caller import check_edits
from transfer_surgery.sites.examine import observe
from transfer_surgery.sites.observation import Event, Observation
from transfer_surgery.sites.plan import Plan
from transfer_surgery.sites.route import Expression, Route
from transfer_surgery.sites.site import CallerCode, Site
from transfer_surgery.sites.source import Function
from transfer_surgery.sites.unseen import unseen_calls, written_calls
from transfer_surgery.sites.unwatched import Names
from transfer_surgery.sites.ways import assign_ways, check_intercepted
from transfer_surgery.sites.zoo import adapt_sites, find_example_input

_IN = {"eval": "in evaluation", "train": "in training"}
_OTHER = {True: "an in-place call", False: "no in-place call"}


def find_activations(
    model: nn.Module, example_input: Any = None, *, modes: Sequence[str] = ("eval", "train")
) -> Plan:
    """List every activation call of a model, which is not changed.

    Its forward runs on a stand-in, once or more in each mode: what its code does outside of the
    model, such as printing or counting, it does as often.

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
        RuntimeError: the model's code keeps a tensor of the stand-in where nothing can remove it.

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
    observations, failures = observe(model, arguments, modes)
    return _plan(model, observations, failures)


def _plan(model: nn.Module, observations: dict[str, Observation], failures: list[str]) -> Plan:
    merged: dict[tuple[str, Any], dict[str, Any]] = {}
    firsts: dict[tuple[str, Any], Event] = {}
    for mode, observation in observations.items():
        for event in observation.sites():
            first = firsts.setdefault((event.caller, event.key), event)
            fields = merged.setdefault((event.caller, event.key), event.fields() | {"modes": ()})
            fields["modes"] += (mode,)
            fields["calls"] = max(fields["calls"], event.calls)
            fields["overwrites_input"] |= event.overwrites_input
            fields["input_changes"] |= event.fields()["input_changes"]
            fields["reason"] = fields["reason"] or event.reason or first.clash(event)
            if event.inplace != first.inplace:
                fields["inplace"] = False
                if fields["overwrites_input"]:
                    fields["reason"] = f"{_IN[mode]} it is {_OTHER[event.inplace]}"
            if event.source != fields["source"]:
                fields["reason"] = f"{_IN[mode]} it is another activation ({event.source})"
    assign_ways(model, merged, list(observations.values()))
    seen = _seen_expressions(observations, merged)
    calls = _caller_codes(observations, merged, seen)
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
    sites = check_intercepted(model, check_edits(model, adapt_sites(model, sites), calls))
    scripted = sorted(set[str]().union(*(one.scripted for one in observations.values())))
    notes = [f"{what or 'the model'} is TorchScript: not examined" for what in scripted]
    notes += _unwatched(model, observations, seen)
    notes += [
        f"{site.path}: intercepted, because {site.why}"
        for site in sites
        if site.way == "intercept" and site.reason is None
    ]
    walkers = frozenset[str]().union(*(one.walkers for one in observations.values()))
    return Plan(tuple(sites), tuple(failures), tuple(notes), calls, walkers)


def _unwatched(
    model: nn.Module, observations: dict[str, Observation], seen: set[Expression]
) -> list[str]:
    """A note on each activation that ran unseen, with the calls that it may be."""
    counts = Counter[Names]()
    for observation in observations.values():
        counts |= observation.unwatched.counts
    if not counts and any(one.unwatched.is_unknown for one in observations.values()):
        return ["some values came from code that nobody can watch: activations there stay"]
    return [
        f"{' or '.join(names)} ran {count}x where nobody can look, in another thread, TorchScript "
        f"or compiled code: not converted{written_calls(model, names, seen)}"
        for names, count in counts.items()
    ]


def _seen_expressions(
    observations: dict[str, Observation], merged: dict[tuple[str, Any], dict[str, Any]]
) -> set[Expression]:
    seen = set[Expression]().union(*(one.expressions for one in observations.values()))
    routes = (f["route"] for f in merged.values())
    steps = (step for one in routes if isinstance(one, Route) for step in one.steps)
    return seen.union(Expression(step.function, step.position) for step in steps)


def _caller_codes(
    observations: dict[str, Observation],
    merged: dict[tuple[str, Any], dict[str, Any]],
    seen: set[Expression],
) -> dict[str, CallerCode]:
    functions: dict[str, set[Function]] = {}
    for (caller, _), f in merged.items():
        if isinstance(f["route"], Route):
            functions.setdefault(caller, set()).update(s.function for s in f["route"].steps)
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
