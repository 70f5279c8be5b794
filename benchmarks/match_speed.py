"""Time and memory of matching beside forward passes, for deeper and deeper networks.

    python benchmarks/match_speed.py
    git worktree add ../before COMMIT
    python benchmarks/match_speed.py --before ../before

The time of a site should not grow with the depth. With `--before` the same is measured with the
code in another folder, such as a worktree of an earlier commit. Times are CPU seconds, which other
programs disturb less. Each row is measured in a process of its own. Linux only.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from own_process import HERE, in_a_process, observed
from rich.console import Console
from rich.table import Table
from torch import nn

from transfer_surgery import MatchWarning, convert, match_targets

BATCH, WIDTH, SIZE = 64, 32, 16


def main(
    depth: Annotated[
        list[int] | None, typer.Option(help="Number of convolutions; several times.")
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
    before: Annotated[
        Path | None, typer.Option(help="A folder with other code of the library.")
    ] = None,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Match plain convolutional networks with random weights, and refit their layers."""
    depths = depth or [8, 16, 32, 64, 128]
    if measure:
        print(json.dumps(_measure(depths[0], images, measure == "refit", threads)))
        return
    table = Table(title=f"match_targets, {images} images of {SIZE} pixels, {threads} threads")
    for head in ("code", "how", "sites", "CPU s", "s per site", "forwards", "MiB"):
        table.add_column(head, justify="left" if head in ("code", "how") else "right")
    folders = {"now": HERE} | ({} if before is None else {"before": before.resolve()})
    for code, folder in folders.items():
        for how in ("match", "refit"):
            for number in depths:
                options = ("--depth", number, "--images", images, "--threads", threads)
                found = in_a_process(__file__, "--measure", how, *options, library=folder)
                seconds = found["seconds"]
                row = [f"{seconds:.1f}", f"{seconds / number:.2f}"]
                row += [f"{seconds / found['forward']:.0f}", f"{found['mib']:,.0f}"]
                table.add_row(code, how, str(number), *row)
    Console().print(table)
    Console().print(
        "Forwards: how many times as long as one pass of the same images. MiB: by how much "
        "matching raises the peak of the process's memory."
    )


def _network(depth: int) -> nn.Sequential:
    """Convolutions with ReLUs whose outputs neither grow nor vanish."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for number in range(depth):
        layer = nn.Conv2d(WIDTH if number else 3, WIDTH, 3, padding=1)
        nn.init.kaiming_normal_(layer.weight, mode="fan_in")
        layers += [layer, nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def _measure(depth: int, images: int, refit: bool, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = _network(depth)
    batches = list(torch.randn(images, 3, SIZE, SIZE).split(BATCH))

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    forward()  # sets the statistics of the norms, and prepares kernels
    convert(model.eval(), "sin", example_input=batches[0][:2])
    start = time.process_time()
    forward()
    pass_seconds = time.process_time() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MatchWarning)
        start = time.process_time()
        _, _, mib = observed(lambda: match_targets(model, batches, refit=refit))
    seconds = time.process_time() - start
    return {"seconds": seconds, "forward": pass_seconds, "mib": mib}


if __name__ == "__main__":
    typer.run(main)
