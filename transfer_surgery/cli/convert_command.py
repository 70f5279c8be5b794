"""``transfer-surgery convert``: a model, with gates at its activations, in a file."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import typer

from transfer_surgery.activations import get_target
from transfer_surgery.cli.finetuning.checkpoint import check_state_not_lost, state_of
from transfer_surgery.cli.options import (
    Exclude,
    GranularityName,
    Include,
    InputSize,
    Model,
    Output,
    Pretrained,
    Role,
    Set,
    Source,
    Weights,
    choose,
    model_spec,
    option_errors,
    run_errors,
)
from transfer_surgery.cli.printing import say
from transfer_surgery.cli.weights import build, check_weights
from transfer_surgery.files import save_model
from transfer_surgery.reports import report
from transfer_surgery.sites import find_activations
from transfer_surgery.surgery import convert as convert_model
from transfer_surgery.units import gate_settings


def convert(
    model: Model,
    output: Output,
    target: Annotated[
        str, typer.Option(help="Transfer to this activation, such as 'snake(a=0.5)'.")
    ] = "sin",
    granularity: GranularityName = "channel",
    gate: Annotated[
        str,
        typer.Option(
            help="Use this kind of gate: hard_concrete, or bernoulli, line or copy of the paper."
        ),
    ] = "hard_concrete",
    noise: Annotated[
        Literal["batch", "example", "none"] | None,
        typer.Option(
            help="Draw gates in training once per batch, per example, or not at all. "
            "Default: per batch, where the gate is drawn."
        ),
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    source: Source = None,
    include: Include = None,
    exclude: Exclude = None,
    role: Role = None,
    seed: Annotated[int, typer.Option(help="Seed the start of the gates, and random weights.")] = 0,
    assignments: Set = None,
    input_size: InputSize = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace a model that FILE holds already. Default: it is kept."
        ),
    ] = False,
) -> None:
    """Put gates at a model's activations, and save the model, whose outputs stay the same.

    FILE is a safetensors file with the gates, the weights, and how the model is made. Train it with
    [b]finetune[/b] or in Python:

    [dim]from transfer_surgery import load_model, save_model[/dim]

    [dim]model = load_model(FILE) ... save_model(model, FILE)[/dim]

    [bold]Examples[/bold]

    transfer-surgery convert resnet50.a1_in1k --pretrained -o run.safetensors

    transfer-surgery convert resnet18 --set num_classes=10 --weights best.pth --target snake
    -o run.safetensors
    """
    spec = model_spec(model, assignments, input_size)
    # What can be refused at once is refused before the model is made.
    check_weights(weights, pretrained)
    if output.exists() and not force:
        raise typer.BadParameter(f"{output} exists already: choose another file, or --force.")
    with option_errors():
        get_target(target)
        settings = gate_settings({"name": gate} | ({} if noise is None else {"noise": noise}))
    with run_errors():
        check_state_not_lost(output)
    if state_of(output).exists() and not force:  # of run.pt, say, where this is run.safetensors
        raise typer.BadParameter(
            f"{state_of(output)} is the state of a training: choose another file, or --force."
        )
    with run_errors():
        torch.manual_seed(seed)
        network = build(spec, weights, pretrained)
        found = find_activations(network, spec.example_input(network))
    plan = choose(found, source, include, exclude, role)
    with run_errors():
        convert_model(
            network,
            target,
            plan=plan,
            roles=role or ("hidden",),
            granularity=granularity,
            gate=settings,
            seed=seed,
        )
        save_model(network, output, spec)
        state_of(output).unlink(missing_ok=True)  # of the training of a model that was here
    converted = report(network)
    total = converted.total
    say(
        f"{output}: {len(converted)} sites, {total.gates:,} gates, {total.source} -> {total.target}"
    )
