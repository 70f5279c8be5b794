"""int8 of a trained SiLU network that was swapped to ReLU, beside one that was built with ReLU.

Both have the same weights: what the swap leaves behind must cost nothing. Prints a table.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from statistics import median

import sklearn.datasets
import torch
import torch.nn.functional as F
from markdown_page import fill_blocks, markdown_table
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from transfer_surgery import bake, convert, swap_targets

TRAIN = 1200
"""Images of the 1,797 to learn from; the others are tested."""


def network(activation: type[nn.Module]) -> nn.Sequential:
    def block(before: int, after: int) -> list[nn.Module]:
        layers = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)
        return [*layers, activation()]

    blocks = [*block(1, 32), *block(32, 64), *block(64, 64)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def quantized(model: nn.Module, images: Tensor) -> fx.GraphModule:
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images,))
    prepared(images)
    integers: fx.GraphModule = convert_fx(prepared)
    return integers


def pairs(model: fx.GraphModule) -> int:
    """How often numbers are quantized and come back."""
    return sum("dequantize" in str(node.target) for node in model.graph.nodes)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def seconds(models: list[nn.Module], images: Tensor, rounds: int) -> list[float]:
    """The median time of each, taken in turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, seen in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images)
            seen.append(time.perf_counter() - start)
    return [median(seen) for seen in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # FX quantization announces its end
    digits = sklearn.datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    data, tests = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])

    original = network(nn.SiLU)
    train(original, *data, options.epochs)
    swapped = convert(copy.deepcopy(original), "relu", example_input=images[:2])
    swap_targets(swapped)
    train(swapped, *data, max(1, options.epochs // 4))
    bake(swapped)
    built = network(nn.ReLU).eval()
    built.load_state_dict(swapped.state_dict())

    with torch.no_grad():
        integers = {
            "SiLU, as trained": quantized(original, data[0]),
            "SiLU swapped to ReLU": quantized(swapped, data[0]),
            "built with `nn.ReLU`": quantized(built, data[0]),
        }
        floats = [accuracy(model, *tests) for model in (original, swapped, built)]
        times = seconds([*integers.values()], tests[0][:64], options.rounds)
        rows = []
        for (name, model), before, spent in zip(integers.items(), floats, times, strict=True):
            after = accuracy(model, *tests)
            shares = f"{before:.1%}", f"{after:.1%}"
            rows.append([name, str(pairs(model)), *shares, f"{1e3 * spent:.2f}"])
    head = ["network", "pairs of quantize and dequantize", "float", "int8", "ms"]
    text = markdown_table(head, rows)
    print(text)
    if options.page is not None:
        options.page.write_text(fill_blocks(options.page.read_text(), {"int8": text}))


if __name__ == "__main__":
    main()
