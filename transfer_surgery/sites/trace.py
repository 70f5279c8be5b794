"""Tracing one owner's ``forward`` with torch.fx, its children being leaves.

Arguments that were no tensors are made concrete, and so are the owner's plain attributes: what was
assumed is recorded, and the generated code checks it at each call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from transfer_surgery.activations import Tracker, recognise
from transfer_surgery.sites.call_location import CallKey, KeyCounter, locate
from transfer_surgery.sites.plan import ActivationChild, Leaf, OwnerCall
from transfer_surgery.sites.zoo import notrace_functions

_PLAIN = (type(None), bool, int, float, str)
_MODULE_STATE = frozenset(vars(nn.Module()))


class Untraceable(Exception):  # noqa: N818 - an outcome that callers expect, not an error
    """An owner that torch.fx cannot trace; the message says why."""


class TracedCall(NamedTuple):
    """An activation call in a graph: its identity, what it is given, and what is inside it.

    `inner` are the nodes of a formula except its last one, the latest first.
    """

    key: CallKey
    args: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...] = ()


@dataclass
class OwnerTrace:
    """The graphs of an owner, one per training mode, and the assumptions that they hold under."""

    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    calls: dict[str, dict[fx.Node, TracedCall]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def bind(forward: Any, call: OwnerCall) -> dict[str, Any]:
    """The value of each parameter of ``forward``, in its order, defaults applied."""
    bound = inspect.signature(forward).bind(None, *call.args, **call.kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def trace_owner(probe: nn.Module, owner: str, call: OwnerCall) -> OwnerTrace:
    """Trace an owner of the probe in both training modes.

    Args:
        probe: the stand-in of the model; see `transfer_surgery.sites.stand_in`.
        owner: path of the owner in it.
        call: how the owner was called when it was observed.

    Raises:
        Untraceable: fx fails, or the graph differs from what was observed.
    """
    module = probe.get_submodule(owner)
    activations = {id(probe.get_submodule(path)): child for path, child in call.modules.items()}
    leaves, trace = notrace_functions(probe), OwnerTrace()
    for mode in ("eval", "train"):
        object.__setattr__(module, "training", mode == "train")
        tracer = _OwnerTracer(call, activations, leaves)
        graph = _trace(tracer, module, trace.attributes)
        trace.graphs[mode], trace.calls[mode] = graph, tracer.calls
        if mode not in call.children:
            continue
        expected = call.keys[mode]
        found = {traced.key for traced in tracer.calls.values()}
        if found != expected:
            raise Untraceable(
                f"in {mode} mode it shows {len(found & expected)} of {len(expected)} "
                f"activation calls, and {len(found - expected)} others"
            )
        children = tuple(str(node.target) for node in graph.nodes if node.op == "call_module")
        ran = tuple(c for c in call.children[mode] if not c.startswith("parametrizations."))
        if children != ran:
            raise Untraceable(f"in {mode} mode it calls other children than when it runs")
    return trace


def _trace(tracer: _OwnerTracer, module: nn.Module, attributes: dict[str, Any]) -> fx.Graph:
    own = type(module)
    parametrizations: Any = module.parametrizations if is_parametrized(module) else ()

    def read(self: nn.Module, name: str) -> Any:
        if name in parametrizations:  # stays an attribute: parametrizations may be removed again
            return tracer.create_proxy("get_attr", name, (), {})
        value = own.__getattribute__(self, name)
        held = object.__getattribute__(self, "__dict__")
        if name in held and name not in _MODULE_STATE and isinstance(value, _PLAIN):
            attributes[name] = value
        return value

    try:
        watched = type(own.__name__, (own,), {"__getattribute__": read})
        object.__setattr__(module, "__class__", watched)  # past a __setattr__ of its own
        return tracer.trace(module)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise Untraceable(f"{type(error).__name__}: {first_line}") from error
    finally:
        object.__setattr__(module, "__class__", own)


class _OwnerTracer(fx.Tracer):
    def __init__(
        self,
        call: OwnerCall,
        activations: Mapping[int, ActivationChild],
        leaves: tuple[Callable[..., Any], ...],
    ) -> None:
        super().__init__(autowrap_functions=leaves)
        self._call, self._activations, self._counter = call, activations, KeyCounter()
        self._tracker = Tracker()
        self.calls: dict[fx.Node, TracedCall] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = inspect.signature(root_fn).parameters
        args: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for name, value in bind(root_fn, self._call).items():
            kind = parameters[name].kind
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                if value:
                    raise Untraceable(f"it was called with more arguments in {name!r}")
                continue
            value = self._stand_in(self.create_proxy("placeholder", name, (), {}), value)
            if kind is inspect.Parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                args.append(value)
        return (lambda *given: root_fn(*given, **keywords)), args

    def _stand_in(self, proxy: fx.Proxy, value: Any) -> Any:
        """A proxy for a tensor, a container of proxies for a container, else the plain value."""
        if value is Leaf.TENSOR:
            return proxy
        if isinstance(value, _PLAIN):
            return value
        if type(value) in (list, tuple) and all(v is Leaf.TENSOR for v in value):
            items: Any = proxy
            return type(value)(items[i] for i in range(len(value)))
        raise Untraceable(f"an argument is a {type(value).__name__}")

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "call_module":
            self._note_module(node)
        elif kind in ("call_function", "call_method"):
            self._note_function(node)
        if kind == "get_attr" and str(target).startswith("_tensor_constant"):
            raise Untraceable("it makes a tensor of its own")
        return node

    def _note_module(self, node: fx.Node) -> None:
        child = self._activations.get(id(self.root.get_submodule(str(node.target))))
        if child is None:
            return
        given: Any = node.args[0] if node.args else next(iter(node.kwargs.values()))
        location = locate()[0][0]
        key = [self._counter.key(location) for _ in range(child.calls)][-1]
        self.calls[node] = TracedCall(key, (given,))
        self._tracker.made(self._tracker.describe(str(child.activation), (given,)), None, (), node)

    def _note_function(self, node: fx.Node) -> None:
        function: Any = node.target
        if isinstance(function, str):
            function = getattr(torch.Tensor, function, None)
        record, match = self._tracker.call(function, node.args, node.kwargs)
        call = match or recognise(function, node.args, node.kwargs)
        if call is not None:
            inner = dict.fromkeys(one.value for _, one in match.inner) if match else ()
            key = self._counter.key(locate()[0][0])
            self.calls[node] = TracedCall(key, (call.input, *call.operands), tuple(inner))
        self._tracker.made(record, function, node.args, node)
