"""How long it takes to find the activations of a model, beside one of its forward passes.

    python benchmarks/find_speed.py

The memory of the search is measured in a process of its own, beside what the outputs of all layers
take in the forward pass. The search runs on fake tensors, which have shapes but no memory. Linux
only.
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
from torch import Tensor, nn
from zoo.models import build

from transfer_surgery import find_activations

# resnetrs420 has the most activations of all models in both zoos, 699.
MODELS = ["timm:resnet50", "timm:resnetrs420"]
EXAMPLES = 2


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Models as timm:NAME ...")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 2,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time `find_activations` at the default input size of timm models, two examples."""
    if measure:
        warnings.simplefilter("ignore")  # of the zoos
        print(json.dumps(_measure(measure, threads)))
        return
    table = Table(title=f"find_activations, {threads} threads, {EXAMPLES} examples")
    table.add_column("model", no_wrap=True)
    for header in ("sites", "find, s", "forward, s", "ratio", "find, MiB", "outputs, MiB"):
        table.add_column(header, justify="right")
    for name in models or MODELS:
        found = in_a_process(__file__, "--measure", name, "--threads", threads)
        times = found["find"], found["forward"], found["find"] / found["forward"]
        memory = found["find_mib"], found["outputs_mib"]
        row = [*(f"{value:.2f}" for value in times), *(f"{value:,.0f}" for value in memory)]
        table.add_row(name, str(found["sites"]), *row)
    Console().print(table)


def _measure(name: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = build(name)
    size = timm.get_pretrained_cfg(name.partition(":")[2]).input_size
    images = torch.randn(EXAMPLES, *size)
    plan, find, grown = observed(lambda: find_activations(model, images))
    with torch.no_grad():
        model(images)  # the first forward also prepares kernels
        _, forward, _ = observed(lambda: model(images))
    return {
        "sites": sum("eval" in site.modes for site in plan),
        "find": find,
        "forward": forward,
        "find_mib": grown,
        "outputs_mib": _output_bytes(model, images) / 2**20,
    }


@torch.no_grad()
def _output_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the outputs of all modules without children, as training would keep them."""
    total = 0

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(add) for leaf in leaves]
    model(images)
    for handle in handles:
        handle.remove()
    return total


if __name__ == "__main__":
    typer.run(main)
