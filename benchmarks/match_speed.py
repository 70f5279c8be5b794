"""Time and memory of matching beside forward passes, for deeper and deeper networks.

    python benchmarks/match_speed.py
    git worktree add ../before COMMIT
    python benchmarks/match_speed.py --before ../before --depth 8 --depth 16 --depth 32

The time of a site should not grow with the depth. With `--before` the same is measured with the
code in another folder, such as a worktree of an earlier commit. Times are CPU seconds, which other
programs disturb less. Each row is measured in a process of its own. Results go to
`benchmarks/results/match_speed.json`, and the table in `docs/pretrained.md` is made from all that
are there. Linux only.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from markdown_page import fill_blocks, markdown_table
from own_process import HERE, in_a_process, observed
from torch import Tensor, nn

from transfer_surgery import MatchWarning, convert, match_targets

BATCH, WIDTH, SIZE = 64, 32, 16
RESULTS, PAGE = Path(__file__).parent / "results" / "match_speed.json", HERE / "docs/pretrained.md"
HEAD = ("code", "how", "sites", "CPU s", "s per site", "as forwards", "forwards run", "MiB")


def main(
    depth: Annotated[
        list[int] | None, typer.Option(help="Number of convolutions; several times.")
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
    before: Annotated[
        Path | None, typer.Option(help="A folder with other code of the library, to measure that.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The JSON file.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page that gets the table.")] = PAGE,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Match plain convolutional networks with random weights, and refit their layers."""
    depths = depth or [8, 16, 32, 64, 128]
    if measure:
        print(json.dumps(_measure(depths[0], images, measure == "refit", threads)))
        return
    code, folder = ("now", HERE) if before is None else ("before", before.resolve())
    found = json.loads(results.read_text()) if results.exists() else []
    for how in ("match", "refit"):
        for sites in depths:
            options = ("--measure", how, "--depth", sites, "--images", images, "--threads", threads)
            row = {"code": code, "how": how, "sites": sites, "images": images}
            found = [other for other in found if not row.items() <= other.items()]
            found.append(row | in_a_process(__file__, *options, library=folder))
            print(found[-1], flush=True)
            results.write_text(json.dumps(found, indent=1) + "\n")
    page.write_text(fill_blocks(page.read_text(), {"match_speed": _table(found)}))


def _table(found: list[dict[str, Any]]) -> str:
    order = sorted(found, key=lambda r: (r["how"], r["sites"], r["code"] != "before"))
    return markdown_table(HEAD, [_cells(row) for row in order])


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, sites = row["seconds"], row["sites"]
    return [
        row["code"], row["how"], str(sites), f"{seconds:.1f}", f"{seconds / sites:.3f}",
        f"{seconds / row['forward']:.0f}", f"{row['passes']:.1f}", f"{row['mib']:,.0f}",
    ]  # fmt: skip


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
    counter = _Counter(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MatchWarning)
        start = time.process_time()
        _, _, mib = observed(lambda: match_targets(model, batches, refit=refit))
    seconds = time.process_time() - start
    passes = counter.examples / (counter.layers * images)
    return {"seconds": seconds, "forward": pass_seconds, "passes": passes, "mib": mib}


class _Counter:
    """Counts the examples that come to the layers of a network, whoever calls it."""

    def __init__(self, model: nn.Module) -> None:
        self.examples = self.layers = 0
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.layers += 1
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.examples += len(output)


if __name__ == "__main__":
    typer.run(main)
