"""The parts of the ``transfer-surgery`` command, one a file."""

import typer

from transfer_surgery.commands.bake import bake
from transfer_surgery.commands.convert import convert
from transfer_surgery.commands.doctor import doctor
from transfer_surgery.commands.export import export
from transfer_surgery.commands.finetune import finetune
from transfer_surgery.commands.plan import plan
from transfer_surgery.commands.report import report
from transfer_surgery.reproduce.command import reproduce

__all__ = ["app"]

app = typer.Typer(
    name="transfer-surgery",
    help="Change the activation functions of a trained network without breaking it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
for command in (plan, convert, finetune, report, bake, export, doctor):
    app.command()(command)
app.add_typer(reproduce, name="reproduce")
