"""The table of docs/tools.md: each tool on each network, beside a network written by hand.

A cell is "works", or "refused" with the library's message; anything else is wrong, with status 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from markdown_page import fill_blocks, markdown_table

from tool_checks import quantizing, tracing, training
from tool_checks.networks import STATES, Case, case

LIBRARY = "transfer_surgery"


class Tool(NamedTuple):
    """A line of the table."""

    name: str
    package: str
    check: Callable[[Case], None]


TOOLS = (
    Tool("`torch.fx.symbolic_trace`", "torch", tracing.fx_trace),
    Tool("`create_feature_extractor`", "torchvision", tracing.feature_extraction),
    Tool("`torch.jit.script`", "torch", tracing.script),
    Tool("`torch.jit.trace`", "torch", tracing.trace),
    Tool("`torch.export`, any batch size", "torch", tracing.export),
    Tool("int8 by FX graphs", "torch", quantizing.fx_quantization),
    Tool("int8 of an exported program (PT2E)", "torchao", quantizing.pt2e_quantization),
    Tool("int8 by onnxruntime", "onnxruntime", quantizing.onnxruntime_int8),
    Tool("`IntegratedGradients`", "captum", tracing.integrated_gradients),
    Tool("`DeepLift`, with a rule", "captum", tracing.deep_lift),
    Tool("`cpu_offload`", "accelerate", training.cpu_offload),
    Tool("`disk_offload`", "accelerate", training.disk_offload),
    Tool("gradients per example", "opacus", training.per_sample_gradients),
    Tool("LoRA", "peft", training.lora),
    Tool("channels pruned", "torch-pruning", training.pruning),
    Tool("operations counted", "fvcore", tracing.fvcore_counts),
    Tool("operations counted", "torchinfo", tracing.torchinfo_counts),
    Tool("replicas of `DataParallel`", "torch", tracing.replicas),
    Tool("`AveragedModel` (EMA)", "torch", training.moving_average),
)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def outcome(tool: Tool, state: str) -> str:
    """ "works", "refused: ..." with the library's own message, or "wrong: ..."."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tool.check(case(state))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if f"/{LIBRARY}/" in Path(frames[-1].filename).as_posix():
            return f"refused: {error}"
        return f"wrong: {type(error).__name__}: {error}".splitlines()[0]
    return "works"


def table(results: dict[Tool, list[str]]) -> str:
    rows = []
    notes: list[str] = []
    for tool, cells in results.items():
        shown = []
        for cell in cells:
            word, _, message = cell.partition(": ")
            if message and message not in notes:
                notes.append(message)
            shown.append(f"{word} ({notes.index(message) + 1})" if message else word)
        version = importlib.metadata.version(tool.package).partition("+")[0]
        rows.append([tool.name, f"{tool.package} {version}", *shown])
    numbered = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([markdown_table(["tool", "package", *STATES], rows), "", *numbered])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="write the table into this page, for --all")
    parser.add_argument("--all", action="store_true", help="a package that is missing is an error")
    options = parser.parse_args()
    torch.set_num_threads(1)
    missing = sorted({tool.package for tool in TOOLS if not installed(tool.package)})
    if missing and options.all:
        sys.exit(f"not installed: {', '.join(missing)}")
    tools = [tool for tool in TOOLS if tool.package not in missing]
    results = {tool: [outcome(tool, state) for state in STATES] for tool in tools}
    text = table(results)
    print(text)
    if options.page is not None:
        options.page.write_text(fill_blocks(options.page.read_text(), {"tools": text}))
    return int(any(cell.startswith("wrong") for cells in results.values() for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
