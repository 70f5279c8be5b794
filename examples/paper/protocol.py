"""How a network is trained: section 4.2 of the paper, and what the paper leaves open."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True)
class Settings:
    """Base of dataclasses of plain numbers and strings."""

    def changed(self, assignments: Iterable[str]) -> Self:
        """The same with some settings replaced.

        Args:
            assignments: such as ``"gamma=0.5"``, ``"noise=example"``.

        Raises:
            ValueError: no such setting, or a value of another type.

        Examples:
            >>> Protocol(epochs=3).changed(["gamma=2", "noise=example"]).gamma
            2.0
        """
        known = {field.name: str(field.type) for field in fields(self)}
        values: dict[str, Any] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals or name not in known:
                raise ValueError(
                    f"{assignment!r}: write NAME=VALUE, where NAME is one of {', '.join(known)}."
                )
            values[name] = _read(name, text, known[name])
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)


@dataclass(frozen=True)
class Protocol(Settings):
    """All settings of a training. Defaults are the paper's where it gives a value.

    Args:
        epochs: of the whole training. Not in the paper.
        batch_size: of training; a last, smaller batch is left out.
        lr: highest learning rate, of SGD with Nesterov's momentum.
        momentum: of SGD.
        weight_decay: of SGD, also of the gates where `gate_weight_decay` is None.
        restart: epochs from the start to the first warm restart; 0: none, one cosine over all
            epochs. Not in the paper.
        restart_factor: each cycle is so many times as long as the one before. Not in the paper.
        clip: largest norm of the gradient of the weights; 0: no clipping. Not in the paper.
        gamma: weight of the structural risk. Not in the paper.
        gate_lr: learning rate of the gates as a multiple of that of the weights. Not in the paper.
        gate_weight_decay: of ``log_alpha``. Not in the paper.
        granularity: what shares a gate. The paper leaves it open ("depending on the transfer
            granularity").
        noise: one draw of the gates per ``"batch"`` or per ``"example"``, or ``"none"``. Not in
            the paper.
        init: what is drawn from N(8, 1), ``"log_alpha"`` or ``"alpha"`` (the paper's word).
        reduction: of the risk, ``"sum"`` over gates or over ``"neurons"`` (Eq. 8 to the letter).
        kaiming: ``"torch"``: the default of PyTorch's layers, He's uniform distribution with
            ``a=sqrt(5)``; ``"normal"``: He's normal distribution for ReLU, biases 0.
        sin_init: weights of *sin*: ``"fourier"``, the paper's N(0, 0.1) and U(-pi, pi), or
            ``"kaiming"``, those of the other networks.
        sin_std: standard deviation in the former; 0.1, or 0.316 if the paper's is a variance.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    restart: int = 0
    restart_factor: int = 1
    clip: float = 0.0
    gamma: float = 1.0
    gate_lr: float = 1.0
    gate_weight_decay: float | None = None
    granularity: str = "channel"
    noise: str = "batch"
    init: str = "log_alpha"
    reduction: str = "sum"
    kaiming: str = "torch"
    sin_init: str = "fourier"
    sin_std: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}: "
                "all must be positive."
            )
        if self.restart < 0 or self.restart_factor < 1 or self.clip < 0 or self.gate_lr <= 0:
            raise ValueError(
                f"restart={self.restart} and clip={self.clip} are 0 or more, "
                f"restart_factor={self.restart_factor} 1 or more, gate_lr={self.gate_lr} above 0."
            )
        if self.kaiming not in ("torch", "normal"):
            raise ValueError(f"kaiming={self.kaiming!r}: use 'torch' or 'normal'.")
        if self.sin_init not in ("fourier", "kaiming"):
            raise ValueError(f"sin_init={self.sin_init!r}: use 'fourier' or 'kaiming'.")


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
