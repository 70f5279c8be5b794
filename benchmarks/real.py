"""Trained networks of other domains: the pitch of sounds, and faces in images.

    TRANSFER_SURGERY_DATA=FOLDER python benchmarks/real.py

converts each network to sines, matches it, refits it, and lets the original teach it, with the
defaults of the library. The folder `FOLDER/real` holds the networks as `nets.py`, with weights,
calibration inputs, and test inputs from other sources. Results go to `benchmarks/results/real/`,
and the page `docs/real.md` is made from all that are there.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from markdown_page import fill_blocks, markdown_table
from torch import nn

from transfer_surgery import convert, distill, match_targets, swap_targets

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "real", HERE.parent / "docs" / "real.md"
STEPS = {"crepe_tiny": 50, "mtcnn_rnet": 400, "mtcnn_pnet": 1500}
TITLES = {
    "crepe_tiny": "CREPE tiny: the pitch of a sound (360 sigmoids)",
    "mtcnn_rnet": "MTCNN's R-Net: a face in 24 x 24 pixels, and its box",
    "mtcnn_pnet": "MTCNN's P-Net: a face in 12 x 12 pixels, and its box",
}


def main(
    network: Annotated[list[str] | None, typer.Option(help="Only these; several times.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of distilling.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of distilling.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 1,
) -> None:
    """Measure the networks whose data is there, and write the page."""
    torch.set_num_threads(threads)
    folder = Path(os.environ.get("TRANSFER_SURGERY_DATA", "")) / "real"
    if not (folder / "nets.py").exists():
        raise typer.BadParameter(f"{folder}/nets.py is not there: set TRANSFER_SURGERY_DATA.")
    nets = _nets(folder)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in network or STEPS:
        result = measure(nets, name, folder, steps or STEPS[name], seed)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(fill_blocks(PAGE.read_text(), {"results": _tables()}))


def measure(
    nets: ModuleType, name: str, folder: Path, steps: int, seed: int
) -> dict[str, dict[str, float]]:
    """The metrics of a network after each stage, with the CPU seconds that the stage took."""
    teacher: nn.Module = nets.load(name, folder)
    batches = nets.batches_of(name, folder)
    found: dict[str, dict[str, float]] = {}

    def note(stage: str, model: nn.Module, start: float) -> None:
        seconds = time.process_time() - start
        found[stage] = {**nets.metric(name, model, folder), "CPU seconds": seconds}
        print(name, stage, found[stage], flush=True)

    def swapped(target_fit: bool, refit: bool) -> nn.Module:
        model = convert(copy.deepcopy(teacher), "sin", example_input=batches[0][:2])
        if target_fit:
            match_targets(model, batches, refit=refit)
        return swap_targets(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note("original", teacher, time.process_time())
        for stage, options in (
            ("plain sine", (False, False)),
            ("matched", (True, False)),
            ("refitted", (True, True)),
        ):
            start = time.process_time()
            model = swapped(*options)
            note(stage, model, start)
        torch.manual_seed(seed)
        start = time.process_time()
        report = distill(model, teacher, batches, steps=steps)
        note(f"distilled, {steps} steps", model, start)
    print(name, report)
    return found


def _nets(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nets", folder / "nets.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder}/nets.py cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tables() -> str:
    tables = []
    for name, title in TITLES.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        stages = json.loads(file.read_text())
        heads = list(stages["original"])
        rows = [
            [stage, *(_cell(head, values[head], stage) for head in heads)]
            for stage, values in stages.items()
        ]
        tables.append(f"## {title}\n\n{markdown_table(['', *heads], rows)}")
    return "\n\n".join(tables)


def _cell(head: str, value: float, stage: str) -> str:
    if head == "CPU seconds":
        return "-" if stage == "original" else f"{value:.0f}"
    shares = ("within", "agreement", "found", "false")
    return f"{value:.1%}" if any(word in head for word in shares) else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(main)
