"""What ``convert`` and ``finetune`` share: how a model is to be converted, and doing it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from transfer_surgery.activations import get_activation
from transfer_surgery.cli.finetuning.checkpoint import STATE
from transfer_surgery.cli.options import asked, build, expected, tell
from transfer_surgery.cli.plan_command import choose
from transfer_surgery.cli.weights import read_weights
from transfer_surgery.files import ModelSpec, load_weights, read_files, read_spec, save_model
from transfer_surgery.reports import report
from transfer_surgery.sites import find_activations
from transfer_surgery.surgery import convert
from transfer_surgery.units import GateSettings, gate_settings

Target = Annotated[str, typer.Option(help="What to transfer to, such as 'snake(a=0.5)'.")]
Granularity = Annotated[
    Literal["layer", "channel", "neuron"], typer.Option(help="What has a gate of its own.")
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Checkpoint: .safetensors or .pth.", exists=True, dir_okay=False),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="The zoo's weights.")]


@dataclass(frozen=True)
class Conversion:
    """A model by name, with its weights, and how it is converted; as the options of ``convert``."""

    spec: ModelSpec
    weights: Path | None
    pretrained: bool
    target: str
    granularity: Literal["layer", "channel", "neuron"]
    seed: int
    gate: str = "hard_concrete"
    noise: Literal["batch", "example", "none"] | None = None
    source: list[str] | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    role: list[str] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.pretrained:
            raise typer.BadParameter("give --weights or --pretrained, not both.")
        with asked(ValueError):
            get_activation(self.target)
            self.gate_settings()

    def gate_settings(self) -> GateSettings:
        """The gates that ``--gate`` and ``--noise`` ask for.

        Raises:
            ValueError: there is no such gate, or it draws nothing.
        """
        noise = {} if self.noise is None else {"noise": self.noise}
        return gate_settings({"name": self.gate, **noise})

    def run(self) -> nn.Module:
        """Make the model, load its weights and convert it."""
        torch.manual_seed(self.seed)
        model = build(self.spec, self.pretrained)
        if self.weights is None and not self.pretrained:
            tell("The weights are random: neither --weights nor --pretrained was given.")
        with expected():
            if self.weights is not None:
                load_weights(model, read_weights(self.weights), str(self.weights))
            whole = find_activations(model, self.spec.example_input(model))
        plan = choose(whole, self.source, self.include, self.exclude, self.role)
        with expected():
            return convert(
                model,
                self.target,
                plan=plan,
                roles=self.role or ("hidden",),
                granularity=self.granularity,
                gate=self.gate_settings(),
                seed=self.seed,
            )

    def refuse_other(self, folder: Path) -> None:
        """Look whether a folder holds this model, converted to this target, trained or not.

        Raises:
            ValueError: naming what differs.
        """
        config, _ = read_files(folder)
        there = read_spec(folder).to_dict() | {
            name: " and ".join(dict.fromkeys(getattr(site, name) for site in config.sites))
            for name in ("target", "granularity")  # the latter may be mixed, by Python's convert
        }
        here = self.spec.to_dict() | {
            "target": str(get_activation(self.target)),
            "granularity": self.granularity,
        }
        different = [
            f"{name} was {there[name]}, is {value} now"
            for name, value in here.items()
            if _plain(there[name]) != _plain(value)
        ]
        if different:
            raise ValueError(
                f"{folder}: {'; '.join(different)}. Go on with the same options, or begin anew in "
                "another folder."
            )


def keep(model: nn.Module, folder: Path, spec: ModelSpec) -> None:
    """Save a model that was just converted, and say what it has."""
    (folder / STATE).unlink(missing_ok=True)  # of the training of a model that was here
    save_model(model, folder, spec)
    sites = report(model)
    total = sites.total
    tell(f"{folder}: {len(sites)} sites, {total.gates:,} gates, {total.source} -> {total.target}")


def _plain(value: Any) -> Any:
    """As JSON gives it back: a tuple in an argument of a model is a list then."""
    return json.loads(json.dumps(value))
