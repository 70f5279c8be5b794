"""``transfer-surgery export``: a network for programs without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from torch import nn

from transfer_surgery.cli.options import Out, expected, tell
from transfer_surgery.files import (
    ModelSpec,
    export_onnx,
    export_program,
    load_model,
    read_baked,
    read_spec,
)
from transfer_surgery.surgery import bake


def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A folder of [b]convert[/b], or a file of [b]bake[/b].",
            exists=True,
            show_default=False,
        ),
    ],
    output: Out,
    form: Annotated[
        Literal["onnx", "torch-export"], typer.Option("--format", help="Of the file.")
    ] = "onnx",
) -> None:
    """Write a network, baked, to a file that runs without transfer_surgery.

    It takes batches of any size and computes what the model does in eval mode. Gates between 0 and
    1 stay as they are: [b]bake --harden[/b] first rounds them.

    [bold]Examples[/bold]

    transfer-surgery export run -o model.onnx

    transfer-surgery export model.safetensors --format torch-export -o model.pt2
    """
    write = {"onnx": export_onnx, "torch-export": export_program}[form]
    with expected():
        network, spec = read_baked(model) if model.is_file() else _bake(model)
        write(network, spec.example_input(network), output)
    tell(f"wrote {output}")


def _bake(folder: Path) -> tuple[nn.Module, ModelSpec]:
    return bake(load_model(folder)), read_spec(folder)
