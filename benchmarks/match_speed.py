"""Time and memory of matching beside a forward pass, for more and more images.

    python benchmarks/match_speed.py

Memory should not grow with the number of images, because sums are kept and no activations. Each row
is measured in a process of its own. Linux only.
"""

from __future__ import annotations

import json
import warnings
from typing import Annotated, Any

import timm
import torch
import typer
from own_process import in_a_process, observed
from rich.console import Console
from rich.table import Table

from transfer_surgery import MatchWarning, convert, match_targets
from transfer_surgery.units import gated_activations

BATCH = 64


def main(
    model: Annotated[str, typer.Option(help="A timm model.")] = "resnet18",
    image_size: Annotated[int, typer.Option(help="Height and width of the images.")] = 64,
    images: Annotated[
        list[int] | None, typer.Option(help="Number of images; several times.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 2,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Match a network with random weights, and refit its layers, in batches of 64."""
    numbers = images or [64, 512]
    if measure:
        print(json.dumps(_measure(model, image_size, numbers[0], measure == "refit", threads)))
        return
    table = Table(title=f"match_targets, {model}, {image_size} pixels, {threads} threads")
    heads = ("images", "sites", "match, s", "forwards", "match, MiB", "largest site, MiB")
    for head in ("how", *heads):
        table.add_column(head, justify="left" if head == "how" else "right")
    for how in ("match", "refit"):
        for number in numbers:
            options = ("--model", model, "--image-size", image_size, "--images", number)
            found = in_a_process(__file__, "--measure", how, "--threads", threads, *options)
            row = [f"{number:,}", str(found["sites"]), f"{found['seconds']:.1f}"]
            row += [f"{found['seconds'] / found['forward']:.0f}"]
            row += [f"{found['mib']:,.0f}", f"{found['largest_mib']:,.0f}"]
            table.add_row(how, *row)
    Console().print(table)
    Console().print(
        "match, MiB: by how much matching raises the peak of the process. Forwards: how many times "
        "as long as one pass of the same images. Largest site: its inputs of all these images."
    )


def _measure(name: str, size: int, number: int, refit: bool, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    batches = list(torch.randn(number, 3, size, size).split(BATCH))
    largest = 0

    def see(module: Any, args: Any) -> None:
        nonlocal largest
        largest = max(largest, args[0].nbytes // len(batches[0]) * number)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    convert(model, "sin")
    handles = [unit.register_forward_pre_hook(see) for _, unit in gated_activations(model)]
    with torch.no_grad():
        model(batches[0])  # also prepares kernels
    for handle in handles:
        handle.remove()
    _, pass_seconds, _ = observed(forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MatchWarning)
        found, seconds, mib = observed(lambda: match_targets(model, batches, refit=refit))
    return {
        "sites": len(found.rows),
        "seconds": seconds,
        "forward": pass_seconds,
        "mib": mib,
        "largest_mib": largest / 2**20,
    }


if __name__ == "__main__":
    typer.run(main)
