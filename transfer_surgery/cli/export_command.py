"""``transfer-surgery export``: a network for programs without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from transfer_surgery.cli.options import Output, run_errors
from transfer_surgery.cli.printing import say
from transfer_surgery.files import export_onnx, export_program, load_network
from transfer_surgery.surgery import bake
from transfer_surgery.units import GatedActivation


def export(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A file that [b]convert[/b], save_model or [b]bake[/b] wrote.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    output: Output,
    form: Annotated[
        Literal["onnx", "torch-export"], typer.Option("--format", help="Write this format.")
    ] = "onnx",
) -> None:
    """Write a network, baked, to a file that runs without transfer_surgery.

    It takes batches of any size and computes what the model does in eval mode. Gates between 0 and
    1 stay as they are; [b]bake --harden[/b] first rounds them.

    [bold]Examples[/bold]

    transfer-surgery export run.safetensors -o model.onnx

    transfer-surgery export baked.safetensors --format torch-export -o model.pt2
    """
    write: Any = {"onnx": export_onnx, "torch-export": export_program}[form]
    with run_errors():
        spec, network = load_network(model)
        if any(isinstance(module, GatedActivation) for module in network.modules()):
            bake(network)
        write(network, spec.example_input(network), output)
    say(f"wrote {output}")
