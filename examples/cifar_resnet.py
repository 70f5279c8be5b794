"""Transfer the trained CIFAR-10 ResNets of He et al. (2016) from ReLU to sine.

The blocks call `F.relu`, so `convert` redirects the calls in their code: there is no activation
module to replace.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file
from summary import Summary, console, describe_change
from torch import Tensor, nn

from transfer_surgery import (
    HardConcrete,
    History,
    TransferSchedule,
    bake,
    convert,
    report,
    wrap_optimizer,
)
from transfer_surgery.cli.finetuning.images import load_cifar10
from transfer_surgery.cli.finetuning.training import Machine, predict, train


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """A ResNet for 32x32 images; its depth is 20, 32, 44 or 56 in the paper."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth}: use 6n + 2, such as 20, 32, 44 or 56.")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def _stage(self, inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        first = Block(inputs, outputs)
        return nn.Sequential(first, *(Block(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def main(
    depth: Annotated[int, typer.Option(help="Depth of the ResNet: 20, 32, 44 or 56.")] = 20,
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint; by default from $TRANSFER_SURGERY_DATA/weights."),
    ] = None,
    target: Annotated[str, typer.Option(help="Activation to transfer to.")] = "sin",
    granularity: Annotated[
        str, typer.Option(help="Who shares a gate: layer, channel or neuron.")
    ] = "channel",
    noise: Annotated[
        str, typer.Option(help="Noise of the gates: batch, example or none.")
    ] = "batch",
    order: Annotated[
        str, typer.Option(help="Who goes first: joint, front_to_back or back_to_front.")
    ] = "joint",
    fraction: Annotated[float, typer.Option(help="Share of the gates to transfer.")] = 1.0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the transfer.")] = 3,
    images: Annotated[int, typer.Option(min=1, help="Training images to use.")] = 50_000,
    batch_size: int = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.1,
    device: Annotated[
        str, typer.Option(help="Device; auto takes CUDA where there is a GPU.")
    ] = "auto",
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Convert, transfer and bake a trained CIFAR-10 ResNet."""
    torch.manual_seed(seed)
    machine, summary = Machine.choose(device), Summary()
    model = machine.place(trained_resnet(depth, weights))
    data = load_cifar10(batch_size=batch_size, device=machine.device, limit=images)
    before = predict(model, data.test, machine)
    summary.add(f"ResNet-{depth}, ReLU", before.accuracy)
    console.print(f"ResNet-{depth} as trained: test error {1 - before.accuracy:.2%}")

    example = next(iter(data.test))[0][:2]
    gate = HardConcrete(noise=noise)
    convert(model, target, granularity=granularity, gate=gate, example_input=example)
    converted = predict(model, data.test, machine)
    summary.add("converted", converted.accuracy, change=converted.change_from(before))
    console.print(f"converted: test error {1 - converted.accuracy:.2%}")
    describe_change("convert", converted.change_from(before))

    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    schedule = TransferSchedule(epochs * len(data.train), fraction=fraction, order=order)
    wrap_optimizer(optimizer, model, transfer=schedule)
    history = History(model)
    after = train(model, data, optimizer, machine, epochs=epochs, title="transfer", history=history)
    table = report(model)
    summary.add("transferred", after.accuracy, transferred=table.total.transferred)
    print(table)
    console.print(f"transferred: asked for {fraction:.1%}, reached {table.total.transferred:.1%}")

    bake(model)
    baked = predict(model, data.test, machine)
    summary.add("baked", baked.accuracy, change=baked.change_from(after))
    describe_change("bake", baked.change_from(after))
    console.print(summary.table())
    if output:
        figures = summary.to_dict() | {"asked": fraction, "report": table.to_dict()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures | {"history": history.to_dict()}))


def trained_resnet(depth: int, file: Path | None = None) -> ResNet:
    """The published network of a depth, from a file or from the data folder, in eval mode."""
    model = ResNet(depth)
    model.load_state_dict(load_file(file or _weights(depth)))
    return model.eval()


def _weights(depth: int) -> Path:
    folder = os.environ.get("TRANSFER_SURGERY_DATA")
    if not folder:
        raise typer.BadParameter(
            "name a checkpoint with --weights, or its folder's parent with TRANSFER_SURGERY_DATA."
        )
    return Path(folder) / "weights" / f"cifar10_resnet{depth}.safetensors"


if __name__ == "__main__":
    typer.run(main)
