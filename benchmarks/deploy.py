"""The study of deployment: SiLU, GELU and hardswish to ReLU in trained networks, then int8.

    python benchmarks/deploy.py train mobilenetv3
    python benchmarks/deploy.py grid mobilenetv3 | xargs -I{} sh -c '{}'
    python benchmarks/deploy.py latency mobilenetv3
    python benchmarks/deploy.py table

`train` trains a network on CIFAR-10. `run` swaps its activations by one recipe and writes a JSON
file to benchmarks/results/deploy; `grid` prints the commands of the recipes in the tables that have
no file yet. `latency` times what they left. `table` puts the tables into docs/deploy.md. Networks
are kept in the folder that --cache names. The folder that TRANSFER_SURGERY_DATA names must have
CIFAR-10; without it torchvision downloads the images.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import typer
from deploy_int8 import error_of, latencies, write_both
from deploy_networks import (
    NETWORKS,
    Data,
    load_data,
    load_trained,
    train_network,
    training_seconds,
)
from deploy_table import Latency, Recipe, Result, fill, published, read_results
from rich.console import Console
from sparsity import share_of_zeros
from study import (
    calibration,
    changed_answers,
    machine_note,
    print_commands,
    swapped,
    train_with_labels,
    write_json,
)
from torch import Tensor, nn

from transfer_surgery import distill
from transfer_surgery.cli.finetuning.images import Unlabelled
from transfer_surgery.cli.finetuning.training import Machine, predict

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
RESULTS = Path(__file__).with_name("results") / "deploy"
_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
console = Console()
app = typer.Typer(help=__doc__.split("\n")[0], add_completion=False)
Name = Annotated[str, typer.Argument(help=", ".join(NETWORKS))]
Folder = Annotated[Path, typer.Option(help="Folder of the JSON files.")]
Cache = Annotated[Path, typer.Option(help="Folder of the trained networks and ONNX files.")]
CACHE = _HOME / "transfer_surgery" / "deploy"
Threads = Annotated[int, typer.Option(help="Number of CPU threads.")]
Limit = Annotated[int | None, typer.Option(help="Use only this many images of each part.")]


@app.command()
def train(
    network: Name,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of 351 steps each.")] = 30,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    seed: int = 0,
    amp: Annotated[bool, typer.Option(help="Train in bfloat16.")] = False,
    compiled: Annotated[bool, typer.Option(help="Train with torch.compile.")] = False,
    threads: Threads = 1,
    limit: Limit = None,
    cache: Cache = CACHE,
) -> None:
    """Train one network; called again, it goes on after the last whole epoch."""
    if network not in NETWORKS:
        raise typer.BadParameter(f"{network}: use one of {', '.join(NETWORKS)}.")
    torch.set_num_threads(threads)
    machine = Machine.choose(amp=amp, compile=compiled)
    data = load_data(machine.device, limit)
    train_network(network, cache, data, machine, epochs, lr, seed)


@app.command()
def run(
    network: Annotated[str, typer.Option(help=", ".join(NETWORKS))],
    start: Annotated[
        str, typer.Option(help="Start: original, plain, matched, refitted.")
    ] = "refitted",
    lesson: Annotated[
        str, typer.Option(help="What trains: none, teacher (no labels), labels.")
    ] = "none",
    steps: Annotated[int, typer.Option(min=0, help="Training steps; an epoch has 351.")] = 0,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    images: Annotated[
        int, typer.Option(min=1, help="Number of unlabelled images for matching.")
    ] = 1024,
    offset: Annotated[str, typer.Option(help="Offsets of targets: none, fitted.")] = "none",
    gates: Annotated[
        str,
        typer.Option(help="Squeeze-and-excitation: sigmoid, or hardsigmoid (plain, matched)."),
    ] = "sigmoid",
    seed: int = 0,
    threads: Threads = 1,
    limit: Limit = None,
    cache: Cache = CACHE,
    folder: Folder = RESULTS,
) -> None:
    """One recipe."""
    recipe = Recipe(network, start, lesson, steps, lr, images, offset, gates, seed)
    torch.set_num_threads(threads)
    machine = Machine.choose("cpu")
    data = load_data(machine.device, limit)
    result = study(recipe, data, machine, cache, threads)
    write_json(result, folder / f"{recipe.name}.json")
    console.print(
        f"{recipe.name}: {result.error:.2%}, int8 {result.int8_error:.2%} (held out "
        f"{result.held_out_error:.2%}, int8 {result.held_out_int8_error:.2%})"
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def grid(
    context: typer.Context,
    network: Name,
    seeds: Annotated[int, typer.Option(help="Number of seeds of the best recipe.")] = 3,
    folder: Folder = RESULTS,
) -> None:
    """Print the commands of recipes without a file, for ``xargs -I{} sh -c '{}'``."""
    print_commands((recipe for _, recipe in published(network, seeds)), folder, context.args)


@app.command()
def latency(
    network: Name,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Runs of each network.")] = 200,
    cache: Cache = CACHE,
    folder: Folder = RESULTS,
) -> None:
    """Time the networks of a table in onnxruntime, in turns and on one thread.

    Those that were trained after the swap compute the same operations as before.
    """
    recipes = [recipe for _, recipe in published(network) if recipe.lesson == "none"]
    names = [recipe.name for recipe in recipes if (cache / f"{recipe.name}.int8.onnx").exists()]
    if (original := Recipe(network, "original").name) not in names:
        raise typer.BadParameter(f"{cache} has no {original}.int8.onnx: run that recipe first.")
    files = [cache / f"{name}{kind}.onnx" for name in names for kind in ("", ".int8")]
    images = torch.rand(batch, 3, 32, 32)
    found = [round(1e3 * seconds, 4) for seconds in latencies(files, images, rounds)]
    pairs = {name: found[2 * i : 2 * i + 2] for i, name in enumerate(names)}
    where = f"1 thread, onnxruntime {onnxruntime.__version__}"
    result = Latency(network, batch, pairs, where)
    write_json(result, folder / "latency" / f"{network}-batch{batch}.json")


@app.command()
def table(
    page: Annotated[Path, typer.Option(help="Markdown page whose tables are made anew.")] = PAGE,
    folder: Folder = RESULTS,
) -> None:
    """Make the tables of docs/deploy.md from the results."""
    page.write_text(fill(page.read_text(), read_results(folder)))


def study(recipe: Recipe, data: Data, machine: Machine, cache: Path, threads: int) -> Result:
    teacher = machine.place(load_trained(recipe.network, cache))
    torch.manual_seed(recipe.seed)
    batches = calibration(data.train, recipe.images, recipe.seed)

    # Make the network.
    begun = time.process_time()
    model, left = made(recipe, teacher, data, batches)
    seconds = time.process_time() - begun
    if recipe.start == "original" and recipe.lesson == "none":
        seconds = training_seconds(recipe.network, cache)

    # Look at it, in float and in int8.
    original = predict(teacher, data.test, machine)
    now = predict(model, data.test, machine)
    some = [images for images, _ in data.test][:8]
    zeros = share_of_zeros(model, some)
    held_out = predict(model, data.held_out, machine)
    _, integers = write_both(model, batches[:8], cache / recipe.name)
    return Result(
        recipe,
        error=1 - now.accuracy,
        int8_error=error_of(integers, data.test),
        held_out_error=1 - held_out.accuracy,
        held_out_int8_error=error_of(integers, data.held_out),
        changed=changed_answers(now, original),
        zeros=zeros,
        left=left,
        seconds=round(seconds, 1),
        machine=f"{machine_note(machine, threads)}, onnxruntime {onnxruntime.__version__}",
    )


def made(
    recipe: Recipe, teacher: nn.Module, data: Data, batches: list[Tensor]
) -> tuple[nn.Module, int]:
    """The network of a recipe without gates, and how many sites have fitted numbers left."""
    model = teacher
    if recipe.gates != "sigmoid":
        model, _ = swapped(
            model, "sigmoid", "hardsigmoid", recipe.gates, batches, offset=False, roles=("gating",)
        )

    def teach(student: nn.Module) -> None:
        augmented = Unlabelled(data.train)
        # The images vary already.
        settings = {"steps": recipe.steps, "lr": recipe.lr, "loss": "kl", "variation": 0.0}
        distill(student, teacher, augmented, **settings)

    model, left = swapped(
        model,
        NETWORKS[recipe.network].source,
        "relu",
        recipe.start,
        batches,
        offset=recipe.offset == "fitted",
        teach=teach if recipe.lesson == "teacher" else None,
    )
    if recipe.lesson == "labels":
        train_with_labels(model, data.train, recipe.steps, recipe.lr)
    return model, left


if __name__ == "__main__":
    app()
