"""The class of a caller: its own class with an edited ``forward``, or with calls intercepted.

A caller keeps its identity: its class becomes a subclass made at run time, as in
``torch.nn.utils.parametrize``. A `Recipe` holds all of it as text and positions, so that callers
can be pickled and deep-copied; those with the same recipe share the class.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from transfer_surgery.activations import Activation
from transfer_surgery.sites.call_location import CallKey
from transfer_surgery.sites.copies import UneditableError
from transfer_surgery.sites.edit import edit_methods
from transfer_surgery.sites.graph import check_graph
from transfer_surgery.sites.intercept import Entry, Interceptor, hidden_units
from transfer_surgery.sites.plan import Plan
from transfer_surgery.sites.route import Expression, Route, Way
from transfer_surgery.sites.site import CallerCode, Site

_CLASSES: WeakValueDictionary[tuple[type[nn.Module], Recipe], type[nn.Module]] = (
    WeakValueDictionary()
)


@dataclass(frozen=True)
class Recipe:
    """All that makes a caller's class: hashable, picklable, free of machine paths.

    Attributes:
        ways: the expressions to edit, also those that stay.
        intercepted: the calls that are redirected while the code runs.
        table: all calls that go to units of the caller.
        seen: all activation calls in the caller's code, converted or not.
        unseen: activation calls that did not run when the model was examined.
    """

    ways: tuple[Way, ...]
    intercepted: tuple[Entry, ...]
    table: tuple[Entry, ...]
    seen: frozenset[CallKey]
    unseen: tuple[tuple[Expression, str], ...]


def rewritten_class(base: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """The subclass of ``base`` that a recipe describes; the same one for the same recipe."""
    made = _CLASSES.get((base, recipe))
    if made is None:
        made = _CLASSES[base, recipe] = _make_class(base, recipe)
    return made


def _make_class(base: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    members: dict[str, Any] = {}
    if recipe.ways:
        members |= edit_methods(base, recipe.ways, recipe.unseen)
    if recipe.intercepted:
        forward = members.get("forward", inspect.getattr_static(base, "forward"))

        def intercept(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with Interceptor(self, recipe.intercepted, recipe.seen):
                return forward.__get__(self, type(self))(*args, **kwargs)

        members |= {"forward": intercept, "_modules": hidden_units(recipe.table)}

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """As the base class wants it done: it may have a way of its own."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        function, args, *rest = reduced
        plain = (base if value is type(self) else value for value in (function, *args))
        return _rebuild, (recipe, *plain), *rest

    @functools.wraps(base.__init__)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """``type(module)(...)`` makes a module that nobody has converted."""
        object.__setattr__(self, "__class__", base)
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    members |= {
        "__init__": construct,
        "_transfer_surgery_recipe": recipe,
        "__reduce_ex__": reduce,
        "__prepare_scriptable__": _refuse_script,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return extend_class(base, members)


class _Quiet(nn.Module):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def extend_class(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass of the same name, made without a word to the metaclass and `__init_subclass__`.

    They may keep a list of all classes, wrap methods, or refuse; this is no class of the user's.
    """
    new = abc.ABCMeta.__new__ if isinstance(base, abc.ABCMeta) else type.__new__
    made: type[nn.Module] = new(type(base), base.__name__, (_Quiet, base), members)
    made.__bases__ = (base,)
    return made


def _refuse_script(self: nn.Module) -> None:
    raise TypeError(
        f"{type(self).__name__} calls other activations than the source in its file says, which is "
        "what torch.jit.script reads: use torch.jit.trace or torch.export."
    )


def _rebuild(recipe: Recipe, function: Any, *args: Any) -> nn.Module:
    """A caller as its base class makes it, of the rewritten class."""
    caller: nn.Module = function(*args)
    object.__setattr__(caller, "__class__", rewritten_class(type(caller), recipe))
    return caller


def prepare_recipes(model: nn.Module, plan: Plan, chosen: set[str]) -> dict[str, Recipe]:
    """The recipe of each caller that gets units of its own; the model stays as it is.

    Args:
        model: the model.
        plan: all of its sites.
        chosen: paths of the sites to convert; the others keep their calls.

    Raises:
        ValueError: the graph of a caller is not what runs.
    """
    recipes = {}
    for path in {s.caller for s in plan if s.path in chosen and s.way == "fx"}:
        check_graph(path, cast(fx.GraphModule, model.get_submodule(path)))
    own = [site for site in plan if site.way in ("edit", "intercept")]
    callers = dict.fromkeys(site.caller for site in own if site.path in chosen)
    for caller in callers:
        sites = [site for site in own if site.caller == caller]
        recipes[caller] = make_recipe(sites, plan.calls[caller], chosen)
    return recipes


def make_recipe(sites: Sequence[Site], calls: CallerCode, chosen: set[str]) -> Recipe:
    """The recipe of one caller.

    Args:
        sites: its sites that are no children, in the order in which they run.
        calls: what was seen in its code.
        chosen: paths of the sites to convert.
    """
    keys = frozenset[CallKey]().union(*calls.keys.values())
    names = {s.path: s.path.rpartition(".")[2] for s in sites if s.path in chosen}
    entries = {
        s.path: Entry(s.key, names[s.path], s.kind == "module", _written_source(s))
        for s in sites
        if s.path in names
    }
    intercepted = [entries[s.path] for s in sites if s.path in names and s.way == "intercept"]
    ways = [
        Way(several[0].route.steps, _turns(several, keys, names))
        for several in same_place(sites)
        if isinstance(several[0].route, Route)
    ]
    table = tuple(entries.values())
    return Recipe(tuple(ways), tuple(intercepted), table, keys, calls.unseen)


def _written_source(site: Site) -> Activation | None:
    return None if site.source.operands else site.source


def same_place(sites: Iterable[Site]) -> list[list[Site]]:
    """Edited sites that are calls of one expression on one way from ``forward``."""
    places: dict[Any, list[Site]] = defaultdict(list)
    for site in sites:
        if isinstance(site.route, Route):
            places[site.route.steps].append(site)
    return list(places.values())


def _turns(
    several: list[Site], keys: Iterable[CallKey], names: dict[str, str]
) -> tuple[str | None, ...]:
    """The units that take turns at a place; None for calls that stay as they are."""
    locations = {site.key.location for site in several}
    route = several[0].route
    if len(locations) > 1 or (isinstance(route, Route) and route.end.expected is not None):
        return tuple(names.get(site.path) for site in several)
    count = sum(key.location in locations for key in keys)
    units: list[str | None] = [None] * count
    for site in several:
        units[site.key.number] = names.get(site.path)
    return tuple(units)


def check_edits(
    model: nn.Module, sites: Sequence[Site], calls: Mapping[str, CallerCode]
) -> list[Site]:
    """Edit each caller's functions, without using them; what cannot be edited is intercepted."""
    unfit: dict[str, str] = {}
    for caller in dict.fromkeys(site.caller for site in sites if site.way == "edit"):
        own = [site for site in sites if site.caller == caller and site.way == "edit"]
        unfit |= {s.path: why for several in same_place(own) for s, why in _unfit(several)}
        own = [site for site in own if site.path not in unfit]
        base = type_before_parametrizations(model.get_submodule(caller))
        try:
            rewritten_class(base, make_recipe(own, calls[caller], {site.path for site in own}))
        except (UneditableError, SyntaxError) as error:
            unfit |= {site.path: str(error) for site in own}
    return [
        replace(site, way="intercept", why=unfit[site.path], route=None)
        if site.path in unfit
        else site
        for site in sites
    ]


def _unfit(several: list[Site]) -> Iterator[tuple[Site, str]]:
    """Of calls of one expression, those whose turns cannot be told, and why."""
    if len(several) == 1:
        return
    for site in several:
        if isinstance(site.route, Route) and site.route.again:
            yield site, "a checkpoint repeats an expression that is several sites"
        elif len({s.key.location for s in several}) > 1 and len({s.modes for s in several}) > 1:
            yield site, "its calls come in another order in training"
