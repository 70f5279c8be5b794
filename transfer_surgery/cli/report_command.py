"""``transfer-surgery report``: what became of the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from transfer_surgery.cli.options import Json, run_errors
from transfer_surgery.cli.printing import say, show
from transfer_surgery.files import read_gates, replace_file
from transfer_surgery.reports import figure_of
from transfer_surgery.reports import report as report_of


def report(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A file that [b]convert[/b], save_model or save_gates wrote.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    by: Annotated[
        Literal["site", "stage"],
        typer.Option(help="Print a row for each site, or for each stage of the model."),
    ] = "site",
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the report to this .png, .pdf or .svg file, too. Default: no picture.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the gates that were transferred, kept or are mixed, site by site.

    The model itself is not needed.

    [bold]Examples[/bold]

    transfer-surgery report run.safetensors --by stage

    transfer-surgery report run.safetensors --plot gates.png --json
    """
    with run_errors():
        found = report_of(read_gates(file), by=by)
        if plot is not None:
            figure = figure_of(found.plot())
            replace_file(plot, lambda path: figure.savefig(path, dpi=100))
            say(f"wrote {plot}")
    show(found.to_json() if as_json else str(found))
