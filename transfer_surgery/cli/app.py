"""The parts of the ``transfer-surgery`` command, one a file."""

import inspect
from collections.abc import Callable
from typing import Any

import typer

from transfer_surgery.cli.bake_command import bake
from transfer_surgery.cli.convert_command import convert
from transfer_surgery.cli.doctor_command import doctor
from transfer_surgery.cli.export_command import export
from transfer_surgery.cli.finetuning.command import finetune
from transfer_surgery.cli.plan_command import plan
from transfer_surgery.cli.printing import with_results
from transfer_surgery.cli.report_command import report
from transfer_surgery.cli.swapping.command import swap


def _help(command: Callable[..., Any]) -> str:
    """Its docstring with a line per paragraph: typer breaks lines of rich markup as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


app = typer.Typer(
    name="transfer-surgery",
    help="Change the activation functions of a trained network without breaking it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
for command in (plan, swap, convert, finetune, report, bake, export, doctor):
    app.command(help=_help(command))(with_results(command))
