"""Results as Markdown: our errors beside the paper's, its claims, the gates of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from claims import MEASURE, TABLE1, findings
from networks import find_row
from results import Results, Run


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown.

    Examples:
        >>> print(markdown(["network", "error"], [["relu", "0.9"]]))
        | network | error |
        |---|---|
        | relu | 0.9 |
    """
    lines = [head, ["---"] * len(head), *rows]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    texts[1] = texts[1].replace(" ", "")
    return "\n".join(texts)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds, and how many of them diverged.

    Examples:
        >>> spread([1.0, 2.0, float("inf")], 2)
        '1.50 ± 0.71, 1 diverged'
    """
    finite = [value for value in values if math.isfinite(value)]
    lost = len(values) - len(finite)
    text = f"{mean(finite):.{digits}f}" if finite else ""
    if len(finite) > 1:
        text += f" ± {stdev(finite):.{digits}f}"
    return ", ".join(filter(None, [text, f"{lost} diverged" if lost else ""]))


def error_table(results: Results) -> str:
    """A row per network: the paper's error and ours, the mean gate at the end, minutes.

    Classification errors are in percent; for the Bessel function they are mean squared errors, of
    which the paper gives none.
    """
    digits = _digits(results)
    paper = TABLE1.get(results.task)
    head = ["network", *(["paper: conv", "best"] if paper else []), "conv", "best", "E[z]"]
    rows = []
    for row in results.rows:
        theirs = paper.get(row) if paper else None
        cells = [f"{value:.2f}" for value in theirs] if theirs else ["-", "-"]
        minutes = mean(run["seconds"] for run in results.of(row)) / 60
        rows.append(
            [
                f"`{row}`",
                *(cells if paper else []),
                *(spread(results.scores(row, measure), digits) for measure in ("conv", "best")),
                _mean_gate(results, row),
                f"{minutes:.1f}",
            ]
        )
    return markdown([*head, "minutes"], rows)


def claims_table(results: Results) -> str:
    """A row per pair of networks that the paper compares; empty where there is none."""
    digits = _digits(results)
    paper = TABLE1.get(results.task, {})
    rows = []
    for found in findings(results):
        names = (found.better, found.worse)
        ours = [spread(results.scores(name, MEASURE), digits) for name in names]
        theirs = [f"{paper[name][0]:.2f}" if name in paper else "-" for name in names]
        p = f"{min(found.p, found.reverse_p):.3f}"
        rows.append(
            [
                found.claim,
                f"`{found.better}` < `{found.worse}`",
                " < ".join(theirs) if paper else "-",
                " / ".join(ours),
                p,
                found.verdict,
            ]
        )
    head = ["claim", "networks", "paper", "ours", "p", "verdict"]
    return markdown(head, rows) if rows else ""


def gate_table(results: Results) -> str:
    """The mean gate of each site at the end of training, over seeds: 1 is all source, 0 all sine.

    Trainings that diverged are left out; a table without rows is empty.
    """
    rows, head = [], ["network"]
    for row in results.rows:
        sites = [run["sites"] for run in results.of(row) if run["sites"]]
        if sites:
            together = list(zip(*sites, strict=True))
            head = ["network", *(f"`{seeds[0]['path']}`" for seeds in together)]
            gates = ([site["mean_gate"] for site in seeds] for seeds in together)
            rows.append([f"`{row}`", *(spread(values, 3) for values in gates)])
    return markdown(head, rows) if rows else ""


def figure1_table(result: Mapping[str, Any]) -> str:
    """The outcome as Markdown: how often the sine was found, and where the trainings ended.

    Args:
        result: what `figure1.run_figure1` returned, or its JSON.
    """

    def row(name: str, network: Mapping[str, Any]) -> list[str]:
        w, losses = network["w"], network["loss"]
        cells = [f"{network['found']:.1%}", f"{median(w):.3f} ({min(w):.3f} to {max(w):.3f})"]
        return [
            f"`{name}`",
            *cells,
            f"{median(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})",
        ]

    number = result["settings"]["seeds"]
    return markdown(
        ["network", f"found sin(2x), of {number} seeds", "final w", "final loss"],
        (row(name, network) for name, network in result["networks"].items()),
    )


def machine_line(results: Results) -> str:
    """Seeds, devices, versions and time, in a sentence."""
    seeds = {len(results.of(row)) for row in results.rows}
    machines = sorted({_machine(run) for run in results.runs})
    versions = sorted({run["torch"] for run in results.runs})
    minutes = sum(run["seconds"] for run in results.runs) / 60
    many = "-".join(str(number) for number in sorted({min(seeds), max(seeds)}))
    return (
        f"{many} seeds, {results.settings['epochs']} epochs, {'; '.join(machines)}, torch "
        f"{', '.join(versions)}, {minutes:.0f} minutes of training in all."
    )


def _machine(run: Run) -> str:
    machine = run["machine"]
    return machine["name"] + (" in bfloat16" if machine["precision"] == "bf16" else "")


def _digits(results: Results) -> int:
    return 4 if results.task == "bessel" else 2


def _mean_gate(results: Results, row: str) -> str:
    ends = [curve[-1] for run in results.of(row) if (curve := run["curve"].get("mean_gate"))]
    return spread(ends, 2) if ends else "-"


def study_table(study: Mapping[str, Any]) -> str:
    """A study as Markdown: for each network error and, where it has gates, E[z] in brackets.

    Args:
        study: what `run_study` returned, or its JSON.
    """
    lines = study["lines"]
    rows = list(dict.fromkeys(row for line in lines for row in line["networks"]))
    digits = 4 if study["task"] == "bessel" else 2
    return markdown(
        ["changed", *(f"`{row}`" for row in rows)],
        (
            [line["changed"], *(_cell(line["networks"].get(row), digits) for row in rows)]
            for line in lines
        ),
    )


def _cell(network: Mapping[str, Sequence[float | None]] | None, digits: int) -> str:
    if network is None:
        return ""
    errors = [float("inf") if error is None else error for error in network["conv"]]
    gates = [gate for gate in network["mean_gate"] if gate is not None]
    return spread(errors, digits) + (f" ({spread(gates, 2)})" if gates else "")


def settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per row of `studies.vary_settings`; a network that was not looked at has empty cells.

    Columns are, for each network, the share of the seeds that found the sine of w = 2, the share of
    those whose gate was transferred, where there is a gate, and the median of the final w.
    """
    networks = list(dict.fromkeys(name for row in rows for name in row["networks"]))
    head = ["changed"]
    for name in networks:
        transferred = ["gate transferred"] if find_row(name).gate else []
        head += [f"{name}: found", *transferred, "median w"]
    lines = []
    for row in rows:
        words = " ".join(f"{name}={value}" for name, value in row["changed"].items())
        cells = [words or "as settled"]
        for name in networks:
            shares = ("found", "transferred") if find_row(name).gate else ("found",)
            seen = row["networks"].get(name)
            cells += [f"{100 * seen[share]:.0f} %" if seen else "" for share in shares]
            cells.append(f"{seen['w']:.2f}" if seen else "")
        lines.append(cells)
    return markdown(head, lines)
