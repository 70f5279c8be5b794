"""Activation calls in a ``torch.fx.GraphModule``: its graph is the truth, so its nodes are edited.

A node that is an activation call becomes a call of a unit. The unit keeps what it was, so that it
can be restored: of a graph module, copies have what the graph calls and nothing else.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from transfer_surgery.activations import Call, Match, Record
from transfer_surgery.sites.route import NoRouteError

_REPLACED = "_transfer_surgery_node"


@dataclass(frozen=True)
class GraphRoute:
    """The node of a graph that becomes a call of the unit.

    Attributes:
        node: its name.
        inputs: names of the nodes that the unit is given; None: the arguments as they are.
    """

    node: str
    inputs: tuple[str, ...] | None


@dataclass(frozen=True)
class _Input:
    """An argument that is the unit's, by its number."""

    number: int


@dataclass(frozen=True)
class _Saved:
    """A node as it was; its arguments may be nodes of a formula, too.

    A module that no node calls any more is kept here, too.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: nn.Module | None


def find_node(
    module: fx.GraphModule,
    frames: Sequence[FrameType],
    called: Call | Any,
    match: Match | None,
) -> GraphRoute:
    """The node that makes a running call.

    Args:
        module: whose code runs.
        frames: those of its code, the outermost first.
        called: the activation call; anything else is an activation module.
        match: the formula that the call completes, if any.

    Raises:
        NoRouteError: the graph does not show the call.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    frame, line = frames[0], module.code.split("\n")[frames[0].f_lineno - 1]
    found = re.match(r"\s*(\w+)", line)  # each node is a statement, which assigns to its name
    node = nodes.get(found.group(1)) if found else None
    if node is None or len(frames) > 1:
        raise NoRouteError("it is not in the graph, but in a function that the graph calls")
    if not isinstance(called, Call):
        return GraphRoute(node.name, None)
    values = {name: frame.f_locals.get(name) for name in nodes}
    inner = {id(record.value): record for _, record in match.inner} if match else {}
    inputs: dict[int, str] = {}
    wanted = [id(x) for x in (called.input, *called.operands)]
    _find_inputs(node, values, inner, wanted, inputs)
    if not all(one in inputs for one in wanted):
        raise NoRouteError("its graph does not show its input")
    return GraphRoute(node.name, tuple(inputs[one] for one in wanted))


def check_graph(path: str, module: fx.GraphModule) -> None:
    """Refuse a graph that is not what runs.

    Raises:
        ValueError: it was changed after it was compiled.
    """
    if module.graph.python_code("self").src != module.code:
        raise ValueError(
            f"{path or 'the model'}: its graph was changed after it was compiled; call recompile() "
            "on it, then convert."
        )


def _find_inputs(
    node: fx.Node,
    values: Mapping[str, Any],
    inner: Mapping[int, Record],
    wanted: Sequence[int],
    inputs: dict[int, str],
) -> None:
    """Walk from a node to the nodes of the tensors that are wanted, through the formula's own."""
    for one in node.all_input_nodes:
        value = values[one.name]
        if id(value) in wanted:
            inputs[id(value)] = one.name
        elif id(value) in inner:
            given = [v.value for v in inner[id(value)].operands if isinstance(v, Record)]
            tensors = dict(zip((n.name for n in one.all_input_nodes), given, strict=False))
            _find_inputs(one, {**values, **tensors}, inner, wanted, inputs)
        else:
            raise NoRouteError(f"the activation reads {one.name} too")


def edit_graph(module: fx.GraphModule, units: Sequence[tuple[GraphRoute, str]]) -> None:
    """Let nodes of a graph call units.

    Args:
        module: the module with the graph, and with the units.
        units: where each unit is called, and its name.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    for route, name in units:
        node = nodes[route.node]
        inputs = None if route.inputs is None else [nodes[one] for one in route.inputs]
        given = node.all_input_nodes if inputs is None else inputs
        setattr(module.get_submodule(name), _REPLACED, _save(module, node, given))
        formula = [one for one in node.all_input_nodes if one not in given]
        node.op, node.target = "call_module", name
        if inputs is not None:
            node.args, node.kwargs = tuple(inputs), {}
        _erase_unused(formula)
    module.graph.lint()
    module.recompile()


def _save(module: fx.GraphModule, node: fx.Node, inputs: Sequence[fx.Node]) -> _Saved:
    def save(one: fx.Node) -> Any:
        return _Input(inputs.index(one)) if one in inputs else _save(module, one, inputs)

    target = str(node.target) if isinstance(node.target, OpOverload) else node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), save)
    called = module.get_submodule(str(target)) if node.op == "call_module" else None
    return _Saved(node.name, node.op, target, args, kwargs, called)


def _erase_unused(nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if not node.users:
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            _erase_unused([one for one in inputs if one.op != "placeholder"])


def restore_graph(module: nn.Module) -> None:
    """Give a graph back the nodes that call units, and remove the units."""
    if not isinstance(module, fx.GraphModule):
        return
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    units = {node: module._modules.get(str(node.target)) for node in calls}
    replaced = {n: getattr(u, _REPLACED) for n, u in units.items() if hasattr(u, _REPLACED)}
    for node, saved in replaced.items():
        del module._modules[str(node.target)]
        node.op, node.target, node.args, node.kwargs = _restore(module, saved, node)
    if replaced:
        module.recompile()


def _restore(module: fx.GraphModule, saved: _Saved, node: fx.Node) -> tuple[str, Any, Any, Any]:
    given = node.all_input_nodes

    def restore(value: Any) -> Any:
        if isinstance(value, _Input):
            return given[value.number]
        if isinstance(value, _Saved):
            with node.graph.inserting_before(node):
                return node.graph.create_node(*_restore(module, value, node), name=value.name)
        return value

    target = saved.target
    if saved.module is not None and saved.module not in module.modules():
        module.add_submodule(target, saved.module)
    if saved.op == "call_function" and isinstance(target, str):
        target = operator.attrgetter(target)(torch.ops)
    args, kwargs = fx.node.map_aggregate((saved.args, saved.kwargs), restore)
    return saved.op, target, args, kwargs
