"""Settings as a user writes them on a command line: ``gamma=0.5``."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from typing import Any, Self

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of dataclasses of plain numbers and strings."""

    def changed(self, assignments: Iterable[str]) -> Self:
        """The same with some settings replaced.

        Args:
            assignments: such as ``"gamma=0.5"``, ``"noise=example"``.

        Raises:
            ValueError: no such setting, or a value of another type.

        Examples:
            >>> from transfer_surgery.reproduce.protocol import Protocol
            >>> Protocol(epochs=3).changed(["gamma=2", "noise=example"]).gamma
            2.0
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        values: dict[str, Any] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals or name not in fields:
                raise ValueError(
                    f"{assignment!r}: write NAME=VALUE, where NAME is one of {', '.join(fields)}."
                )
            values[name] = _read(name, text, str(fields[name].type))
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return dataclasses.asdict(self)


def _read(name: str, text: str, kind: str) -> Any:
    """A value of the annotated type."""
    if kind == "str":
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if value is None and "None" in kind:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
        raise ValueError(f"{name}={text}: give a value of type {kind}.")
    return value if kind == "int" else float(value)
