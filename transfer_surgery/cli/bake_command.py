"""``transfer-surgery bake``: plain modules instead of gates, in one file."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from transfer_surgery.cli.options import Folder, Out, expected, tell
from transfer_surgery.files import load_model, read_spec, save_baked


def bake(
    folder: Folder,
    output: Out,
    harden: Annotated[
        bool, typer.Option("--harden", help="Round gates between 0 and 1; changes the outputs.")
    ] = False,
    fold: Annotated[
        bool, typer.Option("--fold", help="Move fitted numbers into neighbouring layers.")
    ] = False,
) -> None:
    """Freeze the gates of a converted model into plain modules, and write its weights.

    FILE is a safetensors file of the baked model's state dict; its header says how the model is
    made, and which activations it has now. Load it where transfer_surgery is installed:

    [dim]from transfer_surgery import load_baked; model = load_baked("model.safetensors")[/dim]

    The tensors have the names of the original model's, and mixed or matched sites some more. Do not
    load them into the original model: it would compute with its old activations. For use without
    transfer_surgery see [b]export[/b].

    [bold]Examples[/bold]

    transfer-surgery bake run -o model.safetensors

    transfer-surgery bake run --harden --fold -o model.safetensors
    """
    with expected():
        spec, model = read_spec(folder), load_model(folder)
        example = spec.example_input(model)
        if fold:
            torch.manual_seed(0)
            example = torch.randn_like(example)
        save_baked(model, output, spec, harden=harden, fold=example if fold else None)
    tell(f"wrote {output}")
