"""The settings of the module that a unit stands for, such as a negative slope, as time goes on."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import user_stacklevel


class ModuleSettings:
    """What an activation module was set to at the conversion, and what it is set to now.

    Args:
        module: what the network called.
        names: what the code of that module reads.
        unit: the unit that has taken its place and has been given its attributes, which users go
            on setting; None where the module is still there.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], unit: nn.Module | None) -> None:
        self.module = module
        values = {name: inspect.getattr_static(module, name, module) for name in sorted(names)}
        self.then = {
            name: value
            for name, value in values.items()
            if isinstance(value, bool | int | float | str | None)
            and not (unit is not None and _differ(getattr(unit, name, value), value))
        }
        self._latest = dict(self.then)

    def follow(self, unit: nn.Module | None) -> str | None:
        """Keep the unit and the module set alike, wherever a setting was written to.

        Args:
            unit: as before.

        Returns:
            A setting that is another than at the conversion, if there is one.
        """
        changed = None
        for name, value in self.then.items():
            now, latest = getattr(self.module, name, value), self._latest[name]
            if unit is not None and _differ(now, mine := getattr(unit, name, now)):
                if _differ(mine, latest):
                    now = mine
                    setattr(self.module, name, now)
                setattr(unit, name, now)
            if _differ(now, latest):
                self._latest[name] = now
            if _differ(now, value):
                changed = name
        return changed


# So that it runs while torch.compile reads the code.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_of_setting(path: str, name: str) -> None:
    """Say that a module runs without gates, since this setting has changed."""
    warnings.warn(
        f"{path}: {name} is not what it was when the model was converted. The module runs as it is "
        "set now, without gates. Revert, and convert with this setting.",
        RuntimeWarning,
        stacklevel=user_stacklevel(),
    )


def _differ(one: Any, other: Any) -> bool:
    return one is not other and (isinstance(one, Tensor) or bool(one != other))
