"""What it brings to refit grouped convolutions, in networks that are made of them.

    TRANSFER_SURGERY_DATA=FOLDER python benchmarks/grouped_refit.py --networks NETWORKS

matches a MobileNetV3 and an EfficientNet that `benchmarks/deploy.py train` trained on CIFAR-10, and
refits no layer, all but the grouped ones, or all. Nothing is trained. The table goes to
`docs/pretrained.md`.
"""

from __future__ import annotations

import copy
import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from deploy_networks import load_data, load_trained
from markdown_page import fill_blocks, markdown_table
from own_process import HERE
from torch import Tensor, nn

from transfer_surgery import MatchWarning, convert, match_targets, swap_targets
from transfer_surgery.cli.finetuning.images import MemoryLoader
from transfer_surgery.cli.finetuning.training import Machine, predict

PAGE = HERE / "docs" / "pretrained.md"
HEAD = ("network", "target", "as trained", "matched", "refitted, not grouped layers", "refitted",
        "grouped layers", "CPU s")  # fmt: skip


def main(
    networks: Annotated[Path, typer.Option(help="Folder of the trained networks.")],
    name: Annotated[list[str] | None, typer.Option(help="Only these; several times.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Several times.")] = None,
    images: Annotated[int, typer.Option(help="Number of images for matching.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
    page: Annotated[Path, typer.Option(help="The page that gets the table.")] = PAGE,
) -> None:
    """Error on the 10,000 test images, network by network."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", MatchWarning)
    machine = Machine.choose()
    data = load_data(machine.device)
    chosen = torch.arange(images)  # the training images are in no order
    train = data.train
    plain = MemoryLoader(train.images[chosen], train.labels[chosen], 64, train.preprocessing)
    batches = [inputs for inputs, _ in plain]
    rows = []
    for network in name or ["mobilenetv3", "efficientnet"]:
        teacher = load_trained(network, networks)
        for activation in target or ["sin"]:
            errors = [1 - predict(teacher, data.test, machine).accuracy]
            for refit, grouped in ((False, False), (True, False), (True, True)):
                begun = time.process_time()
                model = swapped(teacher, activation, batches, refit, grouped)
                seconds = time.process_time() - begun
                errors.append(1 - predict(model, data.test, machine).accuracy)
                print(network, activation, refit, grouped, f"{errors[-1]:.2%}", flush=True)
            count = str(len(grouped_layers(teacher)))
            cells = [f"{error:.2%}" for error in errors]
            rows.append([network, activation, *cells, count, f"{seconds:.0f}"])
    page.write_text(fill_blocks(page.read_text(), {"grouped_refit": markdown_table(HEAD, rows)}))


def grouped_layers(model: nn.Module) -> list[nn.Conv2d]:
    """Depthwise convolutions and other grouped ones."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]


def swapped(
    teacher: nn.Module, target: str, batches: list[Tensor], refit: bool, grouped: bool
) -> nn.Module:
    """All hidden activations at their fitted targets."""
    model = convert(copy.deepcopy(teacher), target, example_input=batches[0][:2], seed=0)
    if not grouped:  # a frozen layer is left alone
        for layer in grouped_layers(model):
            layer.requires_grad_(False)
    match_targets(model, batches, refit=refit)
    return swap_targets(model)


if __name__ == "__main__":
    typer.run(main)
