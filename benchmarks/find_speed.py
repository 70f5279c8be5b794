"""How long it takes to find the activations of a model and to convert it, beside a forward pass.

    python benchmarks/find_speed.py
    git worktree add ../before COMMIT
    python benchmarks/find_speed.py --before ../before

With `--before` the same is measured with the library of another commit, too. The memory of the
search is measured in a process of its own, beside what the outputs of all layers take in the
forward pass. The search runs on fake tensors, which have shapes but no memory. Linux only.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from own_process import HERE, in_a_process, observed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo.models import build

from transfer_surgery import convert, find_activations

# resnetrs420 has the most activations of all models in both zoos, 699.
MODELS = ["torchvision:resnet50", "timm:densenet121", "timm:hrnet_w18", "timm:resnetrs420", "llama"]
EXAMPLES = 2


def main(
    models: Annotated[list[str] | None, typer.Argument(help="timm:NAME ... or llama")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 2,
    before: Annotated[
        Path | None, typer.Option(help="Folder with another version of the library.")
    ] = None,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time `find_activations` and `convert` for two examples of the default size."""
    if measure:
        warnings.simplefilter("ignore")  # of the zoos
        print(json.dumps(_measure(measure, threads)))
        return
    table = Table(title=f"find_activations and convert, {threads} threads, {EXAMPLES} examples")
    table.add_column("model", no_wrap=True)
    if before is not None:
        table.add_column("code", no_wrap=True)
    folders = {"now": HERE} | ({} if before is None else {"before": before.resolve()})
    headers = ("sites", "find, s", "convert, s", "forward, s", "ratio", "find, MiB", "outputs, MiB")
    for header in headers:
        table.add_column(header, justify="right")
    for name, (code, folder) in itertools.product(models or MODELS, folders.items()):
        given = "--measure", name, "--threads", threads
        found = in_a_process(__file__, *given, library=folder)
        whole = found["find"] + found["convert"]
        times = found["find"], found["convert"], found["forward"], whole / found["forward"]
        memory = found["find_mib"], found["outputs_mib"]
        row = [*(f"{value:.2f}" for value in times), *(f"{value:,.0f}" for value in memory)]
        table.add_row(name, *([code] if before else []), str(found["sites"]), *row)
    Console().print(table)


def _measure(name: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model, examples = _model(name)
    plan, find, grown = observed(lambda: find_activations(model, examples))
    start = time.perf_counter()
    convert(copy.deepcopy(model), plan=plan)
    converted = time.perf_counter() - start
    with torch.no_grad():
        model(examples)  # the first forward also prepares kernels
        _, forward, _ = observed(lambda: model(examples))
    return {
        "sites": sum("eval" in site.modes for site in plan),
        "find": find,
        "convert": converted,
        "forward": forward,
        "find_mib": grown,
        "outputs_mib": _output_bytes(model, examples) / 2**20,
    }


def _model(name: str) -> tuple[nn.Module, Tensor]:
    """A model and two examples: images, or texts of 128 tokens for a Llama of 12 layers."""
    if name == "llama":
        sizes = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1000}
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, num_attention_heads=4, **sizes))
        return llama.eval(), torch.randint(1000, (EXAMPLES, 128))
    zoo, _, short = name.partition(":")
    size = timm.get_pretrained_cfg(short).input_size if zoo == "timm" else (3, 224, 224)
    return build(name), torch.randn(EXAMPLES, *size)


@torch.no_grad()
def _output_bytes(model: nn.Module, examples: Tensor) -> int:
    """Bytes of the outputs of all modules without children, as training would keep them."""
    total = 0

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(add) for leaf in leaves]
    model(examples)
    for handle in handles:
        handle.remove()
    return total


if __name__ == "__main__":
    typer.run(main)
