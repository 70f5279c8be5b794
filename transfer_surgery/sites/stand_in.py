"""A stand-in of a model that can be run without touching the model.

The copy has the same module tree. Its tensors are fake (shapes without memory) or copies, and it
has those hooks that belong to the model, and others where the model does not run without them.
Whatever a forward pass changes (running statistics, caches, training flags) changes the copy.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as torch_module

from transfer_surgery._randomness import RandomnessKept
from transfer_surgery._running import as_written
from transfer_surgery.sites.copies import copy_function
from transfer_surgery.sites.frames import code_of, is_torch

_HOOKS = {name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict)}
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


_tries: list[None] = []
# Fake tensors log what fails on them, with a traceback; here failing is one of several tries. The
# model may run in threads of its own, hence nothing that belongs to one thread.
logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda _: not _tries)


class Uncopyable(TypeError):  # noqa: N818 - a quality of the model
    """A model that cannot be deep-copied."""


def probe_copy(model: nn.Module, fake: FakeTensorMode | None, all_hooks: bool = False) -> nn.Module:
    """Copy a model's modules; with ``fake``, without copying its tensors.

    Args:
        model: the model.
        fake: makes tensors without memory; None: tensors are copied.
        all_hooks: whether hooks are copied that may be another's, such as a profiler's.

    Raises:
        Uncopyable: the model cannot be deep-copied.
    """
    memo: dict[int, Any] = {}
    own = {(cls.__module__, cls.__qualname__) for m in model.modules() for cls in type(m).__mro__}
    packages = {module.partition(".")[0] for module, _ in own} - {"torch", "builtins", "__main__"}
    hooks: list[tuple[nn.Module, str, dict[Any, Any]]] = []
    for module in model.modules():
        for name in _HOOKS & vars(module).keys():
            table = vars(module)[name]
            memo[id(table)] = OrderedDict()
            kept = {k: h for k, h in table.items() if all_hooks or _is_own(h, own, packages)}
            if kept and name in ("_forward_hooks", "_forward_pre_hooks"):
                hooks.append((module, name, kept))
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, Tensor) and fake is not None:
                memo[id(tensor)] = fake.from_tensor(tensor)
            elif isinstance(tensor, Tensor) and not tensor.is_leaf:  # as old weight_norm keeps
                memo[id(tensor)] = tensor.detach().clone()
    try:
        probe = _deep_copy(model, memo)
    except Exception as error:
        raise Uncopyable(
            f"{type(model).__name__} cannot be deep-copied ({error}), so it cannot be examined "
            "without being changed. Make it deep-copyable, then convert it."
        ) from error
    for module in model.modules():
        if id(module) in memo:
            _copy_closures(vars(memo[id(module)]), memo)
    _separate_names(probe)
    for module in probe.modules():
        for name in _HOOKS:  # of modules with a __deepcopy__ of their own
            object.__setattr__(module, name, OrderedDict())
    for module, name, kept in hooks:
        held = vars(memo[id(module)])
        held[name].update({key: _refer_to_copies(hook, memo) for key, hook in kept.items()})
        for table in (f"{name}_with_kwargs", f"{name}_always_called"):
            flags = vars(module).get(table, {})
            held.get(table, {}).update({key: flags[key] for key in kept & flags.keys()})
    return probe


def _deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a model, which then shares nothing with the copy; `memo` tells the copy of each module.

    A ``__deepcopy__`` of the user's may return the module itself, or one with the same tables or
    tensors. Such modules are copied without it.
    """
    start, held = dict(memo), _held_by(model)
    probe = copy.deepcopy(model, memo)
    if not held & _held_by(probe):
        return probe
    memo.clear()
    memo.update(start)
    own = [module for module in model.modules() if _has_own_copy(type(module))]
    memo.update({id(module): type(module).__new__(type(module)) for module in own})
    for module in own:
        vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
    probe = copy.deepcopy(model, memo)
    if not set(model.modules()).isdisjoint(probe.modules()):
        raise TypeError("its copy has modules in common with it")
    return probe


def _held_by(model: nn.Module) -> set[int]:
    """The modules, tables and tensors of a model, by their identity."""
    found = set[int]()
    for module in model.modules():
        tables = (module._modules, module._parameters, module._buffers)
        found.update(map(id, (module, *tables)))
        found.update(id(x) for table in tables[1:] for x in table.values() if x is not None)
    return found


def _has_own_copy(cls: type[nn.Module]) -> bool:
    code = code_of(getattr(cls, "__deepcopy__", None))
    return code is not None and not is_torch(code)


def _is_own(hook: Any, own: set[tuple[str, str]], packages: set[str]) -> bool:
    """Whether a hook was written in a class or package of the model: it is what the model does."""
    function = getattr(hook, "__func__", hook)
    if getattr(function, "__module__", "").partition(".")[0] in packages:
        return True
    name = getattr(function, "__qualname__", "")
    parts = name.partition(".<locals>")[0].split(".")
    prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return any((getattr(function, "__module__", ""), prefix) in own for prefix in prefixes)


def _copy_closures(attributes: dict[str, Any], memo: dict[int, Any]) -> None:
    """Let functions kept on a module, such as a patched ``forward``, refer to the copies.

    ``deepcopy`` takes functions as they are: the original modules would run.
    """
    for name, value in attributes.items():
        if isinstance(value, FunctionType):
            attributes[name] = _refer_to_copies(value, memo)


def _refer_to_copies(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = tuple(CellType() for _ in value.__closure__)
    function = copy_function(value, value.__code__, cells)
    memo[id(value)] = function  # before its cells, which may hold the function itself
    for cell, original in zip(cells, value.__closure__, strict=True):
        with contextlib.suppress(ValueError):  # a cell may be empty
            cell.cell_contents = _refer_to_copies(original.cell_contents, memo)
    return function


def _separate_names(probe: nn.Module) -> None:
    """Give each name of a shared module without state a copy: calls then tell under which name."""
    seen: set[nn.Module] = set()
    for holder in list(probe.modules()):
        for name, child in holder._modules.items():
            if child in seen and not (child._modules or child._parameters or child._buffers):
                holder._modules[name] = copy.copy(child)
            elif child is not None:
                seen.add(child)


@contextlib.contextmanager
def trying() -> Iterator[None]:
    """What fails on fake tensors in here is not logged: it is one of several tries, or raised."""
    _tries.append(None)
    try:
        yield
    finally:
        _tries.pop()


@contextlib.contextmanager
def undisturbed(is_fake: bool = False) -> Iterator[None]:
    """Examine in silence: random streams stay, global hooks and warnings wait for real runs.

    Compiled functions run as they were written.

    Args:
        is_fake: whether all tensors are fake; torch's random generators then are not used.
    """
    hooks = {name: getattr(torch_module, name) for name in _GLOBAL_HOOKS}
    held = {name: table.copy() for name, table in hooks.items() if table}
    try:
        for name in held:
            hooks[name].clear()
        kept = RandomnessKept(of_torch=not is_fake)
        with trying(), as_written(), kept, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, table in held.items():
            hooks[name].update(table)
