"""``transfer-surgery convert``: a model, with gates at its activations, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from transfer_surgery.cli.conversion import (
    Conversion,
    Granularity,
    Pretrained,
    Target,
    Weights,
    keep,
)
from transfer_surgery.cli.options import InputSize, Model, Set, expected, model_spec
from transfer_surgery.cli.plan_command import Exclude, Include, Role, Source
from transfer_surgery.files import SPEC


def convert(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make.", show_default=False),
    ],
    target: Target = "sin",
    granularity: Granularity = "channel",
    gate: Annotated[
        str, typer.Option(help="hard_concrete, or the paper's bernoulli, line, copy.")
    ] = "hard_concrete",
    noise: Annotated[
        Literal["batch", "example", "none"] | None,
        typer.Option(
            help="Draw gates in training once per batch (the default), per example, or not at all."
        ),
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
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
    if (output / SPEC).exists() and not force:
        raise typer.BadParameter(f"{output} holds a model already; another folder, or --force.")
    conversion = Conversion(
        spec,
        weights,
        pretrained,
        target=target,
        granularity=granularity,
        seed=seed,
        gate=gate,
        noise=noise,
        source=source,
        include=include,
        exclude=exclude,
        role=role,
    )
    network = conversion.run()
    with expected():
        keep(network, output, spec)
