"""The ten networks of section 4.1: what each starts with, and how it comes to the sine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_surgery import Bernoulli, HardConcrete, TransferSchedule, convert, wrap_optimizer
from transfer_surgery.reproduce.protocol import Protocol

__all__ = ["ROWS", "Row", "find_row"]

TARGET = "sin"
_SAMPLED = {"hard_concrete": HardConcrete, "bernoulli": Bernoulli}


def gate_of(kind: str, init: str, noise: str) -> str | HardConcrete | Bernoulli:
    """The gates of a kind, with these settings where they are sampled; line and copy are not."""
    return _SAMPLED[kind](init=init, noise=noise) if kind in _SAMPLED else kind


@dataclass(frozen=True)
class Row:
    """One network of the paper's tables.

    Args:
        name: as in the paper, with ``->`` for its arrow.
        source: the activation that it starts with.
        gate: the kind of gate between that and the sine; None: it stays as it is.
    """

    name: str
    source: str
    gate: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.replace("->", "-to-").lower()

    @property
    def learned(self) -> bool:
        """Whether its gates are learned, that is, whether gamma matters."""
        return self.gate in ("hard_concrete", "bernoulli")

    def convert(self, model: nn.Module, protocol: Protocol, example: Tensor) -> nn.Module:
        """Put this row's gates into a network that has its `source` everywhere.

        Args:
            model: changed in place.
            protocol: what the paper leaves open about the gates.
            example: a batch of inputs.
        """
        if self.gate is None:
            return model
        return convert(
            model,
            TARGET,
            gate=gate_of(self.gate, init=protocol.init, noise=protocol.noise),
            granularity=protocol.granularity,
            example_input=example,
        )

    def wrap(
        self, optimizer: Optimizer, model: nn.Module, protocol: Protocol, steps: int
    ) -> Optimizer:
        """Let the optimizer move this row's gates.

        Args:
            optimizer: of the converted model's parameters.
            model: the converted model.
            protocol: gamma and the speed of the gates.
            steps: optimizer steps of the whole training, for *Copy* and *Line*.
        """
        if self.gate is None:
            return optimizer
        if not self.learned:
            whole = TransferSchedule(steps, start=0.0, end=1.0, shape="linear")
            return wrap_optimizer(optimizer, model, transfer=whole)
        return wrap_optimizer(
            optimizer,
            model,
            gamma=protocol.gamma,
            gate_lr=protocol.gate_lr * protocol.lr,
            gate_weight_decay=protocol.gate_weight_decay,
            reduction=protocol.reduction,
        )


# The paper does not name the source of Line and Bern; that of Copy is resin, so theirs is here too.
ROWS = (
    Row("sin", "sin"),
    Row("resin", "resin"),
    Row("tanh", "tanh"),
    Row("relu", "relu"),
    Row("Copy", "resin", "copy"),
    Row("Line", "resin", "line"),
    Row("Bern", "resin", "bernoulli"),
    Row("resin->sin", "resin", "hard_concrete"),
    Row("tanh->sin", "tanh", "hard_concrete"),
    Row("relu->sin", "relu", "hard_concrete"),
)


def find_row(name: str) -> Row:
    """The row of this name or slug, in any case.

    Raises:
        ValueError: there is none; the message lists all.

    Examples:
        >>> find_row("relu-to-sin").name
        'relu->sin'
    """
    for row in ROWS:
        if name.lower() in (row.name.lower(), row.slug):
            return row
    raise ValueError(f"unknown network {name!r}. Known: {', '.join(row.name for row in ROWS)}.")
