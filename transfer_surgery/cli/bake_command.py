"""``transfer-surgery bake``: plain modules instead of gates, in one file."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from transfer_surgery.cli.options import Converted, Output, expected, tell
from transfer_surgery.files import load_model, read_spec, save_baked


def bake(
    file: Converted,
    output: Output,
    harden: Annotated[
        bool,
        typer.Option(
            "--harden",
            help="Round gates between 0 and 1, which changes the outputs. Default: they stay.",
        ),
    ] = False,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="Move the numbers of fitted targets into neighbouring layers. Default: they stay.",
        ),
    ] = False,
) -> None:
    """Replace the gates of a converted model by plain modules, and write the network to a file.

    The output is a safetensors file of the baked model's state dict; its metadata says how the
    model is made, and which activations it has now. Load it where transfer_surgery is installed:

    [dim]from transfer_surgery import load_baked; model = load_baked("baked.safetensors")[/dim]

    The tensors have the names of the original model's, and mixed or fitted sites some more. Do not
    load them into the original model: it would compute with its old activations. For use without
    transfer_surgery see [b]export[/b].

    [bold]Examples[/bold]

    transfer-surgery bake run.safetensors -o baked.safetensors

    transfer-surgery bake run.safetensors --harden --fold -o baked.safetensors
    """
    with expected():
        spec, model = read_spec(file, "model"), load_model(file)
        example = spec.example_input(model)
        if fold:
            torch.manual_seed(0)
            example = torch.randn_like(example)
        folded = save_baked(model, output, spec, harden=harden, fold=example if fold else None)
    tell(f"wrote {output}" if folded is None else f"{folded}\nwrote {output}")
