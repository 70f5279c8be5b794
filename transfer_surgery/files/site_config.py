"""What a checkpoint says about one gated activation, and how it differs from one of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from transfer_surgery.activations import Activation, get_activation
from transfer_surgery.sites import CallKey, Plan
from transfer_surgery.units import GatedActivation


@dataclass(frozen=True)
class SiteConfig:
    """All of one gated activation but the values of its gates.

    Attributes:
        path: where it lives in the model.
        source: the activation that the network had, as `get_activation` reads it.
        target: the activation it is transferred to, likewise.
        gate: name and settings of the gate, as `GateSettings.to_dict` gives them.
        granularity: ``"layer"``, ``"channel"`` or ``"neuron"``.
        shape: of the gates.
        channel_axis: axis of the channels in the input.
        neurons: elements of the feature shape, per example.
        position: its place in the order in which the model's activations run.
        stage: the part of the model that it belongs to.
        matched: whether the target has parameters, see `match_targets`.
        call: which of the activation calls in the code of its owner, as (number, of how many): a
            name such as ``relu_0`` alone would mean another call once the code has a new one. None
            for a site that is a child module.
    """

    path: str
    source: str
    target: str
    gate: dict[str, Any]
    granularity: str
    shape: tuple[int, ...]
    channel_axis: int
    neurons: int
    position: int
    stage: str
    matched: bool
    call: tuple[int, int] | None

    @classmethod
    def of(cls, path: str, unit: GatedActivation, owner: nn.Module | None) -> SiteConfig:
        """The description of a unit of a converted model.

        Args:
            path: where it lives.
            unit: the unit.
            owner: the module that holds it, None where the unit itself is the model.

        Raises:
            ValueError: its activations cannot be written as text.
        """
        gate = unit.gate
        return cls(
            path=path,
            source=_as_text(path, unit.source),
            target=_as_text(path, unit.target),
            gate=gate.settings.to_dict(),
            granularity=unit.granularity.name,
            shape=gate.shape,
            channel_axis=getattr(unit.granularity, "axis", 1),
            neurons=unit.neurons,
            position=unit.position,
            stage=unit.stage,
            matched=unit.fitted is not None,
            call=_call_of_unit(path.rpartition(".")[2], owner),
        )

    @classmethod
    def from_dict(cls, data: Any) -> SiteConfig:
        """The inverse of `dataclasses.asdict`, after JSON.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        if not isinstance(data, dict) or data.keys() != _CHECKS.keys():
            raise ValueError(f"a site is {data!r}; expected the fields {', '.join(_CHECKS)}")
        for name, is_valid in _CHECKS.items():
            if not is_valid(data[name]):
                raise ValueError(f"site {data['path']!r}: {name} is {data[name]!r}")
        given: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in data.items()}
        return cls(**given)

    def difference(self, here: SiteConfig) -> str:
        """In words, how the site of a model differs from this one; empty where it does not."""
        names = ["source", "target", "granularity", "shape", "matched", "call"]
        if self.granularity == "channel":
            names.append("channel_axis")
        pairs = [(name, getattr(self, name), getattr(here, name)) for name in names]
        if self.gate["name"] != here.gate["name"]:
            pairs.append(("gate", self.gate["name"], here.gate["name"]))
        else:
            pairs += [(k, v, here.gate.get(k)) for k, v in self.gate.items() if k != "init"]
        return "; ".join(
            f"{name} {_words(saved)} in the checkpoint, {_words(found)} here"
            for name, saved, found in pairs
            if saved != found
        )


def _as_text(path: str, activation: Activation) -> str:
    text = str(activation)
    try:
        same = get_activation(text) == activation
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"{path}: {text!r} does not read back as the same activation; parameters of a "
            "registered activation have to be numbers, strings or tuples of these."
        )
    return text


def _words(value: Any) -> str:
    return "none" if value is None else str(value)


def _call_of_unit(name: str, owner: nn.Module | None) -> tuple[int, int] | None:
    recipe = getattr(type(owner), "_transfer_surgery_recipe", None)
    if recipe is None:
        return None
    keys = {entry.unit: entry.key for entry in recipe.table}
    return _rank(keys[name], {*recipe.seen, *keys.values()}) if name in keys else None


def call_of_site(path: str, plan: Plan, chosen: Collection[str]) -> tuple[int, int] | None:
    """`SiteConfig.call` of a site of a plan, where the sites `chosen` are converted."""
    site = plan[path]
    if site.way == "child":
        return None
    own = [s.key for s in plan if s.owner == site.owner and s.way != "child" and s.path in chosen]
    return _rank(
        site.key, {*own, *(k for keys in plan.calls[site.owner].keys.values() for k in keys)}
    )


def _rank(key: CallKey, calls: Iterable[CallKey]) -> tuple[int, int]:
    """By position, seen from the owner's ``forward``: line numbers alone change too easily."""
    order = sorted(calls, key=lambda call: (call.location[::-1], call.number))
    return order.index(key) + 1, len(order)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return type(value) is int


_CHECKS: dict[str, Callable[[Any], bool]] = {
    field.name: _is_text for field in fields(SiteConfig)
} | {
    "granularity": lambda value: value in ("layer", "channel", "neuron"),
    **dict.fromkeys(("channel_axis", "neurons", "position"), _is_whole),
    "shape": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
    "matched": lambda value: type(value) is bool,
    "gate": lambda value: isinstance(value, dict) and _is_text(value.get("name")),
    "call": lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(map(_is_whole, v))),
}
