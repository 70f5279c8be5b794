"""``transfer-surgery bake``: plain modules instead of gates, in one file."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from transfer_surgery._tensors import map_tensors
from transfer_surgery.cli.options import Converted, Output, run_errors
from transfer_surgery.cli.printing import say
from transfer_surgery.files import load_network, save_baked


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
    with run_errors():
        spec, model = load_network(file, "model")
        batch = _random_batch(spec.example_input(model)) if fold else None
        folded = save_baked(model, output, spec, harden=harden, fold=batch)
    say(f"wrote {output}" if folded is None else f"{folded}\nwrote {output}")


def _random_batch(example_input: Any) -> Any:
    """An example input with random numbers, since zeros would not show what folding changes."""
    torch.manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        return torch.randn_like(tensor) if tensor.is_floating_point() else tensor

    return map_tensors(fill, example_input)
