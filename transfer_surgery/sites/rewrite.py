"""The rewriter: owners get a class whose ``forward`` calls gated units, and keep their identity.

An owner's class becomes a subclass made at run time, as in ``torch.nn.utils.parametrize``. Its code
is generated from the fx traces and guarded by what they assumed; where a guard fails, or fx could
not trace the owner, the original ``forward`` runs and its activation calls are dispatched by
position. A `Recipe` holds all of it as text, so that owners can be pickled and deep-copied.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import linecache
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from transfer_surgery.sites.call_location import GENERATED, CallKey
from transfer_surgery.sites.intercept import Entry, dispatched_forward, hidden_units
from transfer_surgery.sites.plan import Leaf, OwnerCall, Plan, Site
from transfer_surgery.sites.stand_in import probe_copy
from transfer_surgery.sites.trace import OwnerTrace, Untraceable, bind, trace_owner

Import = tuple[str, str, str]

_CLASSES: dict[tuple[type[nn.Module], Recipe], type[nn.Module]] = {}


@dataclass(frozen=True)
class Recipe:
    """All that makes an owner's generated class: hashable, picklable, free of machine paths.

    Attributes:
        source: code of ``forward``, ``_forward_eval`` and ``_forward_train``; empty: dispatch only.
        imports: the globals of that code, as (name, module, qualified name).
        table: the call sites for the dispatch.
        seen: all activation calls in the owner's code, converted or not.
    """

    source: str
    imports: tuple[Import, ...]
    table: tuple[Entry, ...]
    seen: frozenset[CallKey]


def rewritten_class(base: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """The subclass of ``base`` that a recipe describes; the same one for the same recipe."""
    if (base, recipe) not in _CLASSES:
        _CLASSES[base, recipe] = _make_class(base, recipe)
    return _CLASSES[base, recipe]


def _make_class(base: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return dispatched_forward(base, self, recipe.table, recipe.seen, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """As the base class wants it done: it may have a way of its own."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        function, args, *rest = reduced
        plain = (base if value is type(self) else value for value in (function, *args))
        return _rebuild, (recipe, *plain), *rest

    members: dict[str, Any] = {"_transfer_surgery_dispatch": dispatch, "forward": dispatch}
    members["_modules"] = hidden_units(recipe.table)
    if recipe.source:
        namespace = {name: _load(module, qualname) for name, module, qualname in recipe.imports}
        filename = f"{GENERATED} {base.__module__}.{base.__qualname__} {hash(recipe):x}>"
        lines = recipe.source.splitlines(keepends=True)
        linecache.cache[filename] = (len(recipe.source), None, lines, filename)
        exec(compile(recipe.source, filename, "exec"), namespace)
        names = ("forward", "_forward_eval", "_forward_train")
        members |= {name: namespace[name] for name in names}
    members |= {
        "_transfer_surgery_recipe": recipe,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _rebuild(recipe: Recipe, function: Any, *args: Any) -> nn.Module:
    """An owner as its base class makes it, of the rewritten class."""
    owner: nn.Module = function(*args)
    object.__setattr__(owner, "__class__", rewritten_class(type(owner), recipe))
    return owner


def prepare_rewrites(model: nn.Module, plan: Plan, chosen: set[str]) -> dict[str, Recipe]:
    """Generate the code of each owner that has to be rewritten; the model stays as it is.

    Args:
        model: the model.
        plan: all of its sites.
        chosen: paths of the sites to convert; the others keep their calls.

    Raises:
        ValueError: an owner's class cannot be subclassed in place.
    """
    owners = dict.fromkeys(s.owner for s in plan if s.path in chosen and s.way != "child")
    if not owners:
        return {}
    probe = probe_copy(model, FakeTensorMode(allow_non_fake_inputs=True))
    return {
        owner: _prepare_owner(
            probe, owner, plan.calls[owner], [s for s in plan if s.owner == owner], chosen
        )
        for owner in owners
    }


def _prepare_owner(
    probe: nn.Module, owner: str, call: OwnerCall, sites: Sequence[Site], chosen: set[str]
) -> Recipe:
    module = probe.get_submodule(owner)
    if any(site.way == "fx" for site in sites):
        recipe = generate_recipe(probe, owner, call, sites, chosen)
    else:
        recipe = Recipe("", (), _table(owner, sites, chosen), _seen(call))
    try:
        object.__setattr__(module, "__class__", rewritten_class(type(module), recipe))
    except TypeError as error:
        raise ValueError(
            f"{owner or 'the model'}: its class {type(module).__name__} cannot be extended "
            f"({error}); leave it out with exclude={owner!r}."
        ) from error
    return recipe


def generate_recipe(
    probe: nn.Module, owner: str, call: OwnerCall, sites: Sequence[Site], chosen: set[str]
) -> Recipe:
    """Trace an owner and write its code; arguments as for `prepare_rewrites`, for one owner.

    Raises:
        Untraceable: fx cannot trace the owner, or the trace cannot be written as code.
    """
    trace = trace_owner(probe, owner, call)
    table = _table(owner, sites, chosen)
    try:
        return _generate(type(probe.get_submodule(owner)), call, trace, table)
    except SyntaxError as error:
        raise Untraceable(f"its trace is no valid code: {error}") from error


def _table(owner: str, sites: Sequence[Site], chosen: set[str]) -> tuple[Entry, ...]:
    prefix = len(owner) + 1 if owner else 0
    return tuple(
        Entry(site.key, site.path[prefix:], site.kind == "module")
        for site in sites
        if site.path in chosen and site.way != "child"
    )


def _seen(call: OwnerCall) -> frozenset[CallKey]:
    return frozenset[CallKey]().union(*call.keys.values())


def _generate(
    base: type[nn.Module], call: OwnerCall, trace: OwnerTrace, table: tuple[Entry, ...]
) -> Recipe:
    units = {entry.key: entry.unit for entry in table}
    parts = [_outer_forward(base, call, trace)]
    namespace: dict[str, Any] = {}
    for mode, graph in trace.graphs.items():
        replaced: dict[fx.Node, fx.Node] = {}
        for node, traced in trace.calls[mode].items():
            if traced.key in units:
                args = tuple(replaced.get(arg, arg) for arg in traced.args)
                replaced[node] = _call_unit(graph, node, units[traced.key], args)
                for inner in traced.inner:
                    if inner not in replaced and not inner.users:
                        graph.erase_node(inner)
        code = graph.python_code("self")
        if any(namespace.get(k, v) is not v for k, v in code.globals.items()):
            raise Untraceable("its two training modes use one name for two things")
        namespace |= code.globals
        parts.append(code.src.replace("def forward(", f"def _forward_{mode}(", 1))
    source = "\n".join(parts)
    used = _names(compile(source, "<check>", "exec"))
    imports = tuple(
        (name, *_locate_object(name, value)) for name, value in namespace.items() if name in used
    )
    return Recipe(source, imports, table, _seen(call))


def _call_unit(graph: fx.Graph, node: fx.Node, unit: str, args: tuple[fx.Node, ...]) -> fx.Node:
    """Replace an activation call by a call of its unit; out of place, as the unit is."""
    with graph.inserting_after(node):
        gated = graph.create_node("call_module", unit, args)
    node.replace_all_uses_with(gated)
    graph.erase_node(node)
    return gated


def _outer_forward(base: type[nn.Module], call: OwnerCall, trace: OwnerTrace) -> str:
    """``forward`` with the original signature: checks the assumptions, then runs one graph."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    values = bind(base.forward, call)
    written, passed, given, guards = ["self"], [], [], []
    keyword_only = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only and "*" not in "".join(written):
            written.append("*")
        keyword_only |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        default = "" if p.default is p.empty else f"={_literal(p.default)}"
        written.append(f"{stars}{p.name}{default}")
        passed.append(f"{stars or (f'{p.name}=' if p.kind is p.KEYWORD_ONLY else '')}{p.name}")
        guards.append(p.name if stars else _guard(p.name, values[p.name]))
        if not stars:
            given.append(p.name)
    guards += [f"self.{name} != {_literal(value)}" for name, value in trace.attributes.items()]
    indent = "\n    "
    return "".join(
        [
            f"def forward({', '.join(written)}):",
            f"{indent}if {' or '.join(guard for guard in guards if guard) or 'False'}:",
            f"{indent}    return self._transfer_surgery_dispatch({', '.join(passed)})",
            f"{indent}if self.training:",
            f"{indent}    return self._forward_train({', '.join(given)})",
            f"{indent}return self._forward_eval({', '.join(given)})\n",
        ]
    )


def _guard(name: str, value: Any) -> str:
    """An expression that is true where an argument differs from what was traced."""
    if value is Leaf.TENSOR:
        return f"{name} is None"
    if type(value) in (list, tuple):
        return f"type({name}) is not {type(value).__name__} or len({name}) != {len(value)}"
    return f"{name} is not {value!r}" if value is None else f"{name} != {_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, (type(None), bool, int, float, str)):
        return repr(value)
    raise Untraceable(f"a default or attribute is a {type(value).__name__}")


def _names(code: Any) -> set[str]:
    nested = (_names(constant) for constant in code.co_consts if hasattr(constant, "co_names"))
    return set(code.co_names).union(*nested)


def _locate_object(name: str, value: Any) -> tuple[str, str]:
    """Module and qualified name under which a global of generated code can be imported again."""
    if isinstance(value, ModuleType):
        return value.__name__, ""
    if isinstance(value, float):
        return "math", name  # fx names infinity and not-a-number `inf` and `nan`
    module = getattr(value, "__module__", None) or builtins.__name__
    qualname = getattr(value, "__qualname__", name)
    try:
        if _load(module, qualname) is value:
            return module, qualname
    except (ImportError, AttributeError):
        pass
    raise Untraceable(f"it uses {name}, which cannot be imported by name")


def _load(module: str, qualname: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in filter(None, qualname.split(".")):
        value = getattr(value, part)
    return value
