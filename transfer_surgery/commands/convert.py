"""``transfer-surgery convert``: a model, with gates at its activations, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from transfer_surgery.activations import get_activation
from transfer_surgery.commands.common import (
    InputSize,
    Model,
    Set,
    asked,
    build,
    expected,
    model_spec,
    tell,
)
from transfer_surgery.commands.plan import Exclude, Include, Role, Source, choose
from transfer_surgery.commands.weights import read_weights
from transfer_surgery.convert import convert as convert_model
from transfer_surgery.find import find_activations
from transfer_surgery.finetune.checkpoint import STATE
from transfer_surgery.gates import gate_class
from transfer_surgery.model_folder import SPEC, load_weights, save_model
from transfer_surgery.report import report

__all__ = ["convert"]


def convert(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False),
    ],
    target: Annotated[str, typer.Option(help="What to transfer to, such as 'snake(a=0.5)'.")] = (
        "sin"
    ),
    granularity: Annotated[
        Literal["layer", "channel", "neuron"], typer.Option(help="What has a gate of its own.")
    ] = "channel",
    gate: Annotated[
        str, typer.Option(help="hard_concrete, or the paper's bernoulli, line, copy.")
    ] = "hard_concrete",
    noise: Annotated[
        Literal["batch", "example", "none"], typer.Option(help="Of the gates, in training.")
    ] = "batch",
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint: .safetensors or .pth.", exists=True, dir_okay=False),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="The zoo's weights.")] = False,
    source: Source = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    seed: Annotated[int, typer.Option(help="Of the gates' start, and of random weights.")] = 0,
    assignments: Set = None,
    input_size: InputSize = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what the folder holds of another model.")
    ] = False,
) -> None:
    """Put gates at a model's activations, and save it: same outputs, ready to be transferred.

    DIR gets the gates as save_gates writes them (config.json, gates.safetensors), the weights
    (model.safetensors) and how the model is made (model.json). Train it with [b]finetune[/b] or in
    Python:

    [dim]model = transfer_surgery.load_model(DIR) ... transfer_surgery.save_model(model, DIR)[/dim]

    [bold]Examples[/bold]

    transfer-surgery convert resnet50.a1_in1k --pretrained -o run

    transfer-surgery convert resnet18 --set num_classes=10 --weights best.pth --target snake -o run
    """
    spec = model_spec(model, assignments, input_size)
    if weights is not None and pretrained:
        raise typer.BadParameter("give --weights or --pretrained, not both.")
    if (output / SPEC).exists() and not force:
        raise typer.BadParameter(f"{output} holds a model already; another folder, or --force.")
    with asked(ValueError):
        get_activation(target)
        gate_class(gate)
    torch.manual_seed(seed)
    network = build(spec, pretrained)
    if weights is None and not pretrained:
        tell("The weights are random: neither --weights nor --pretrained was given.")
    with expected():
        if weights is not None:
            load_weights(network, read_weights(weights), str(weights))
        whole = find_activations(network, spec.example_input(network))
    plan = choose(whole, source, include, exclude, role)
    with expected():
        convert_model(
            network,
            target,
            plan=plan,
            roles=role or ("hidden",),
            granularity=granularity,
            gate=gate,
            noise=noise,
            seed=seed,
        )
        (output / STATE).unlink(missing_ok=True)  # of the training of a model that was here
        save_model(network, output, spec)
    total = report(network).total
    tell(f"{output}: {len(plan)} sites, {total.gates:,} gates, {total.source} -> {total.target}")
