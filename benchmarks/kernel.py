"""How close the Triton kernels come to the speed of a copy, forward and backward.

    python benchmarks/kernel.py --table docs/kernel.md

It needs a CUDA device. The page says what the columns mean, see `NOTE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from transfer_surgery import get_activation

console = Console()
NOTE = (
    "Bandwidth counts each big tensor once: forward reads x and writes y, backward reads x and the "
    "gradient and writes that of x. The copy is `torch.empty_like(x).copy_(x)` of the same tensor "
    "on the same device. Backward includes the small reduction for the gates. Medians over CUDA "
    "events, with a cold L2 cache. Percentages are of the copy's bandwidth; the goals are 85 % "
    "forward and 80 % backward."
)
SHAPES = {
    "(256, 64, 112, 112)": "channels first",
    "(256, 256, 56, 56)": "channels first",
    "(256, 1024, 14, 14)": "channels first",
    "(256, 2048, 7, 7)": "channels first",
    "(256, 56, 56, 256)": "channels last",
    "(256, 14, 14, 1024)": "channels last",
    "(256, 197, 3072)": "tokens",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = {"all 1": (20.0, 0.0), "mixed": (0.0, 1.0), "all 0": (-20.0, 0.0)}


def main(
    source: str = "relu",
    target: str = "sin",
    granularity: Annotated[
        list[str] | None, typer.Option(help="Granularity: layer, channel, neuron; several times.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=", ".join(DTYPES))] = None,
    matched: Annotated[
        bool, typer.Option(help="Measure with a fitted target a*f(w*x + c) + b.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=3)] = 20,
    table: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
) -> None:
    """Print, and write, a table of bandwidths."""
    if not torch.cuda.is_available():
        console.print("[red]No CUDA device: these kernels have no speed to measure here.[/red]")
        raise typer.Exit(1)
    parts = [
        "# Bandwidth of the Triton kernels\n",
        f"`python benchmarks/kernel.py {' '.join(sys.argv[1:])}`, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. {NOTE}\n",
        "| shape, memory | dtype | gates per | phase | copy GB/s | forward | backward |",
        "|---" * 7 + "|",
    ]
    console.print("\n".join(parts))
    for name in dtype or ["fp32", "bf16"]:
        for row in _rows(name, granularity or ["channel"], source, target, matched, rounds):
            parts.append(row)
            console.print(row)
    if table:
        table.write_text("\n".join(parts) + "\n")


def _rows(
    dtype: str, granularities: list[str], source: str, target: str, matched: bool, rounds: int
) -> Iterator[str]:
    for text, memory in SHAPES.items():
        shape = tuple(int(size) for size in text.strip("()").split(", "))
        x = torch.randn(shape, device="cuda", dtype=DTYPES[dtype])
        axis = 1 if memory != "tokens" else -1
        if memory == "channels last":
            x = x.permute(0, 3, 1, 2)
        copy = 2 * _bytes(x) / _seconds(lambda x=x: torch.empty_like(x).copy_(x), rounds)
        for granularity in granularities:
            for phase in PHASES:
                forward, backward = _functions(
                    x, axis, granularity, PHASES[phase], source, target, matched
                )
                speeds = (
                    2 * _bytes(x) / _seconds(forward, rounds),
                    3 * _bytes(x) / _seconds(backward, rounds),
                )
                shares = " | ".join(f"{s / 1e9:.0f} GB/s, {100 * s / copy:.0f} %" for s in speeds)
                yield (
                    f"| {text}, {memory} | {dtype} | {granularity} | {phase} "
                    f"| {copy / 1e9:.0f} | {shares} |"
                )


def _functions(
    x: Tensor,
    axis: int,
    granularity: str,
    phase: tuple[float, float],
    source: str,
    target: str,
    matched: bool,
) -> tuple[Callable[[], object], Callable[[], object]]:
    from transfer_surgery.units.kernels.triton.op import gated_triton

    shape = {"layer": (1,), "channel": (x.shape[axis],), "neuron": x.shape[1:]}[granularity]
    mean, spread = phase
    log_alpha = (mean + spread * torch.randn(shape, device="cuda")).requires_grad_()
    noise = torch.rand(shape, device="cuda").clamp(2.0**-25, 1 - 2.0**-24)
    starts = (1.0, 1.0, 0.0, 0.0)
    parameters = tuple(torch.full(shape, s, device="cuda").requires_grad_() for s in starts)

    def forward(x: Tensor) -> Tensor:
        return gated_triton(
            x,
            log_alpha,
            noise,
            get_activation(source),
            get_activation(target),
            granularity=granularity,
            channel_axis=axis,
            constants=(2 / 3, -0.1, 1.1),
            parameters=parameters if matched else None,
        )

    leaf = x.detach().requires_grad_()
    y, grad = forward(leaf), torch.randn_like(x)
    wanted = (leaf, log_alpha, *(parameters if matched else ()))

    def run_forward() -> Tensor:
        with torch.no_grad():
            return forward(x)

    return run_forward, lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def _seconds(function: Callable[[], object], rounds: int) -> float:
    """Median over rounds; between them writes that empty the cache and let Python run ahead."""
    filler = torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    function()
    times = []
    for _ in range(rounds):
        for _ in range(4):
            filler.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


if __name__ == "__main__":
    typer.run(main)
