"""The config of a transformers model after its activations have changed.

``from_pretrained`` builds a model from its config. Whether that one has the activations of the
model at hand is seen by building it on the meta device, where it takes no memory.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import user_stacklevel


def follow_activations(model: nn.Module) -> None:
    """Let the config name the activations that the model has now; warn where it cannot.

    Args:
        model: a ``PreTrainedModel``. Its config changes only where every activation is then right.
    """
    wanted = _activations(model)
    config: Any = copy.deepcopy(model.config)
    wrong = _wrong(model, config, wanted)
    names = _names_of([wanted[path] for path in wrong]) if wrong else []
    # Try the names in each entry of the config, and of the configs in it, until all is right.
    for place, name in itertools.product([*_places(config)], names):
        if not wrong:
            break
        if (before := _set(config, place, name)) == name:
            continue
        now = _wrong(model, config, wanted)
        if len(now) < len(wrong):
            wrong = now
        else:
            _set(config, place, before)
    if not wrong:
        for place in _places(config):
            _set(model.config, place, _get(config, place))
        return
    fields = ", ".join(
        sorted({f"{place[-1]}={_get(model.config, place)!r}" for place in _places(config)})
    )
    warnings.warn(
        f"the config of {type(model).__name__} ({fields or 'without an activation'}) does not say "
        f"what {len(wrong)} activations are now, such as {wrong[0]}: save_pretrained and "
        "from_pretrained would bring others back. Keep the converted model with save_baked "
        "instead, or load the config's model, convert and bake it as this one, and load the "
        "weights then.",
        RuntimeWarning,
        stacklevel=user_stacklevel(),
    )


def _wrong(model: nn.Module, config: Any, wanted: dict[str, Tensor | None]) -> list[str]:
    """Paths of the activations that a model built from a config would not have."""
    cls = next(c for c in type(model).__mro__ if "_transfer_surgery_recipe" not in vars(c))
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            found = _activations(cls(config))
    except Exception:  # a config that its model refuses, or a model that asks for values
        return [*wanted]
    return [path for path, values in wanted.items() if not _equal(values, found.get(path))]


def _activations(model: nn.Module) -> dict[str, Tensor | None]:
    """Values of the modules that compute a function of each element, by path.

    None for those that baking made of several, or with parameters: no name stands for them.
    """
    from transformers.activations import ACT2CLS

    known = {cls[0] if isinstance(cls, tuple) else cls for cls in ACT2CLS.values()}
    found = {}
    for path, module in model.named_modules():
        package = type(module).__module__.split(".")[0]
        if type(module) in known or package == "transfer_surgery":
            found[path] = _values(module)
    return found


def _values(activation: nn.Module) -> Tensor | None:
    if any(True for _ in activation.parameters()) or any(True for _ in activation.buffers()):
        return None
    with torch.device("cpu"), torch.no_grad():
        result: Tensor = activation(torch.linspace(-8, 8, 161))
    return result


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def _names_of(values: list[Tensor | None]) -> list[str]:
    """A name in transformers of each function with these values."""
    from transformers.activations import ACT2CLS, ACT2FN

    known = {name: _values(ACT2FN[name]) for name in ACT2CLS}
    found = (next((name for name in known if _equal(v, known[name])), None) for v in values)
    return [name for name in dict.fromkeys(found) if name is not None]


def _places(config: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a config, or one inside of it, names an activation."""
    from transformers.activations import ACT2CLS

    for name, value in vars(config).items():
        if isinstance(value, str) and value in ACT2CLS:
            yield (*above, name)
        elif hasattr(value, "to_diff_dict"):
            yield from _places(value, (*above, name))


def _get(config: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        config = getattr(config, name)
    return config


def _set(config: Any, place: tuple[str, ...], value: str) -> Any:
    """Write an entry; return what it was."""
    part = _get(config, place[:-1])
    before = getattr(part, place[-1])
    setattr(part, place[-1], value)
    return before
