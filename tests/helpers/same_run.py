"""Two models that have to do the same: outputs, gradients, and all that a forward leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from transfer_surgery import GatedActivation, HardConcrete, convert

_STATE = frozenset(vars(nn.Module()))


def converted(model: nn.Module, *args: Any) -> nn.Module:
    """A converted copy whose gates are at the source in both modes, and draw no noise."""
    twin = convert(copy.deepcopy(model), example_input=args, gate=HardConcrete(noise="none"))
    for unit in twin.modules():
        if isinstance(unit, GatedActivation):
            nn.init.constant_(unit.log_alpha, 30.0)
    return twin


def assert_same_runs(original: nn.Module, twin: nn.Module, *args: Any, runs: int = 3) -> None:
    """Run both in both modes, several times, and compare everything.

    The attributes of activation modules are left out: a unit answers for them by itself. Gradients
    that flow together are added in another order: they may differ by rounding.
    """
    units = [path for path, unit in twin.named_modules() if isinstance(unit, GatedActivation)]
    for training in (False, True):
        for seed in range(runs):
            wanted = {
                what: value
                for what, value in _run(original.train(training), args, seed).items()
                if not what.startswith(tuple(f"{path}." for path in units))
            }
            try:
                found = _run(twin.train(training), args, seed)
            except RuntimeError as error:
                raise AssertionError("the original runs, the other one fails") from error
            assert wanted.keys() <= found.keys(), wanted.keys() - found.keys()
            for what, value in wanted.items():
                if what.startswith("gradient") and value is not None:
                    torch.testing.assert_close(found[what], value, rtol=1e-4, atol=1e-4)
                else:
                    assert _equal(found[what], value), (what, found[what], value)


def _run(model: nn.Module, args: Any, seed: int) -> dict[str, Any]:
    """The output of one run, and what the run leaves behind, each under a name of its own."""
    model.zero_grad()
    random.seed(seed)
    torch.manual_seed(seed)
    args = pytree.tree_map_only(torch.Tensor, lambda t: t.clone().requires_grad_(), args)
    output = model(*args)
    result: dict[str, Any] = {
        "output": copy.deepcopy(_detached(output)),
        "python's random state": random.getstate(),
        "torch's random state": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }
    leaves = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
    result["requires grad"] = [leaf.requires_grad for leaf in leaves]
    if any(result["requires grad"]):
        sum(leaf.square().sum() for leaf in leaves if leaf.requires_grad).backward()
    for number, x in enumerate(pytree.tree_leaves(args)):
        result[f"gradient of input {number}"] = x.grad
    for path, module in model.named_modules():
        if not isinstance(module, GatedActivation):
            for name, parameter in module.named_parameters(recurse=False):
                result[f"gradient of {path}.{name}"] = parameter.grad
            for name, value in module._buffers.items():
                result[f"{path}.{name}"] = value.clone()
            for name in vars(module).keys() - _STATE:
                result[f"{path}.{name}"] = copy.deepcopy(_detached(vars(module)[name]))
    return result


def _plain(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else value


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    if dataclasses.is_dataclass(value):
        fields = {name: _detached(one) for name, one in vars(value).items()}
        return type(value)(**fields)
    if isinstance(value, dict):
        twin = copy.copy(value)
        twin.update({key: _detached(one) for key, one in value.items()})
        return twin
    return value


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if dataclasses.is_dataclass(one) or type(one).__eq__ is object.__eq__:
        return callable(one) or not hasattr(one, "__dict__") or _equal(vars(one), vars(other))
    return bool(one == other)
