"""How a model is made, as text: a name that a zoo or a file knows, and arguments."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.sites import find_example_input

_MOST = 2**28  # numbers in one example; a file may claim any number


class UnknownModelError(ValueError):
    """There is no model with this name, or it does not take this argument."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be made again.

    Args:
        name: ``"resnet50.a1_in1k"``, ``"timm:resnet50"``, ``"torchvision:resnet50"`` or
            ``"path/to/module.py:function"``. A name without a prefix means timm's model of that
            name, or else torchvision's.
        arguments: what the function that makes the model is called with, such as
            ``{"num_classes": 10}``.
        input_size: shape of one example, such as ``(3, 64, 64)``; None: the zoo's adapter says it.

    Examples:
        >>> spec = ModelSpec("test_resnet", {"num_classes": 10}, (3, 64, 64))
        >>> model = spec.build()
        >>> type(model).__name__, model.num_classes, spec.example_input(model).shape
        ('ResNet', 10, torch.Size([2, 3, 64, 64]))
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        size = self.input_size
        if size is not None:
            if min(size, default=1) < 1 or math.prod(size) > _MOST:
                raise ValueError(f"input_size={size!r}: give a shape such as (3, 224, 224).")
            object.__setattr__(self, "input_size", tuple(size))  # JSON gives a list back

    def build(self, pretrained: bool = False) -> nn.Module:
        """Make the model.

        Args:
            pretrained: whether it gets the weights that the zoo has for it, which are downloaded.

        Raises:
            UnknownModelError: there is no such model, or it does not take the arguments.
            OSError: the weights cannot be downloaded.
            RuntimeError: the code that makes the model failed.
        """
        zoo, _, name = self.name.rpartition(":")
        if zoo.endswith(".py"):
            if pretrained:
                raise UnknownModelError(
                    f"{self.name} is a file, and a zoo's weights are for its own models. Load the "
                    "weights in the function, or give a checkpoint."
                )
            with _importable(Path(zoo)):
                return self._call(_function(Path(zoo), name))
        makers = {"timm": _make_timm, "torchvision": _make_torchvision}
        if zoo not in ("", *makers):
            raise UnknownModelError(
                f"{self.name!r}: write timm:NAME, torchvision:NAME or FILE.py:FUNCTION."
            )
        known = _zoo_names()
        for each in [zoo] if zoo else known:
            if name.partition(".")[0] in known.get(each, ()):
                return self._call(makers[each], name, pretrained)
        raise UnknownModelError(_unknown(name, known if not zoo else {zoo: known.get(zoo, [])}))

    def example_input(self, model: nn.Module) -> Any:
        """A batch of two for the model.

        Raises:
            ValueError: neither `input_size` nor a zoo's adapter tells its shape.
        """
        if self.input_size is None:
            return find_example_input(model)
        parameter = next(model.parameters(), torch.zeros(()))
        return torch.zeros(2, *self.input_size, dtype=parameter.dtype, device=parameter.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: Any) -> ModelSpec:
        """The inverse of `to_dict`, after JSON.

        Raises:
            ValueError: the data does not say how a model is made.
        """
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{data!r} does not say how a model is made: {error}.") from error

    def _call(self, make: Callable[..., Any], *args: Any) -> nn.Module:
        with _explained(self.name):
            model = make(*args, **self.arguments)
        if not isinstance(model, nn.Module):
            raise UnknownModelError(
                f"{self.name} returns a {type(model).__name__}, which is not an nn.Module."
            )
        return model


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say whose code failed: what a user's function raises may be anything."""
    try:
        yield
    except (UnknownModelError, OSError, ImportError):
        raise
    except (Exception, SystemExit) as error:
        message = f"{name} raised {type(error).__name__}: {error}."
        if isinstance(error, TypeError) and "argument" in str(error):
            raise UnknownModelError(message) from error
        raise RuntimeError(message) from error


@contextmanager
def _importable(file: Path) -> Iterator[None]:
    """Let a file import what lies beside it, as a program may."""
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _function(file: Path, name: str) -> Callable[..., Any]:
    """A function, or a class, of a Python file."""
    file = file.absolute()
    # Dataclasses and pickle look for a module by its name, which may be that of another one.
    other = sys.modules.get(file.stem)
    known_as = (
        file.stem if other is None or getattr(other, "__file__", None) == str(file) else str(file)
    )
    spec = importlib.util.spec_from_file_location(known_as, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UnknownModelError(f"there is no file {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known_as] = module
    try:
        with _explained(str(file)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known_as]
        raise
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UnknownModelError(f"{file} has no function {name!r}.{_close(name, known)}")
    return getattr(module, name)  # type: ignore[no-any-return]


def _make_timm(name: str, pretrained: bool, **arguments: Any) -> Any:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        weights = timm.list_pretrained(name.partition(".")[0])
        raise UnknownModelError(f"{name}: there are the weights {', '.join(weights)}.") from error


def _make_torchvision(name: str, pretrained: bool, **arguments: Any) -> Any:
    from torchvision.models import get_model

    return get_model(name, weights="DEFAULT" if pretrained else None, **arguments)


def _zoo_names() -> dict[str, list[str]]:
    """The models of each zoo that is installed, timm first."""
    names: dict[str, list[str]] = {}
    with suppress(ImportError):
        import timm

        names["timm"] = timm.list_models()
    with suppress(ImportError):
        from torchvision.models import list_models

        names["torchvision"] = list_models()
    if not names:
        raise ImportError(
            "models by name need timm or torchvision: pip install 'transfer-surgery[timm]'"
        )
    return names


def _unknown(name: str, known: Mapping[str, list[str]]) -> str:
    zoos = " and ".join(known)
    every = dict.fromkeys(each for names in known.values() for each in names)
    return f"{zoos}: there is no model {name!r}.{_close(name.partition('.')[0], list(every))}"


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
