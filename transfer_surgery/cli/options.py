"""What the commands share: how a model is named, what goes wrong, tables."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from transfer_surgery.files import ModelSpec, UnknownModelError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="resnet50, timm:resnet50.a1_in1k, torchvision:resnet50 or path/to/module.py:function.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An argument for the model, such as num_classes=10; repeat it for several.",
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="CxHxW",
        help="Shape of one example, such as 3x64x64. Default: the zoo's own.",
    ),
]
Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A folder of [b]convert[/b] or save_model.",
        exists=True,
        file_okay=False,
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_WIDE = 10_000  # columns; in a pipe no line of a table is broken


def model_spec(name: str, assignments: list[str] | None, input_size: str | None) -> ModelSpec:
    """The model that the arguments of a command describe."""
    arguments = {}
    for text in assignments or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise typer.BadParameter(f"{text!r}: write NAME=VALUE, such as num_classes=10.")
        arguments[key] = _literal(value)
    if input_size is not None and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", input_size):
        raise typer.BadParameter(f"--input-size {input_size}: write a shape such as 3x64x64.")
    file, colon, function = name.rpartition(":")
    if file.endswith(".py"):  # the folder may be read from elsewhere
        name = f"{Path(file).resolve()}{colon}{function}"
    size = None if input_size is None else tuple(map(int, input_size.split("x")))
    return ModelSpec(name, arguments, size)


def build(spec: ModelSpec, pretrained: bool = False) -> nn.Module:
    """Make a model; names and arguments that are none are the user's mistakes."""
    with asked(UnknownModelError), expected():
        return spec.build(pretrained)


@contextmanager
def asked(*errors: type[Exception]) -> Iterator[None]:
    """Exit with status 2 and the message where the user asked for what there is not."""
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error)) from error


_EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError)


@contextmanager
def expected(errors: tuple[type[Exception], ...] = _EXPECTED) -> Iterator[None]:
    """Exit with status 1 and the message, without a traceback, where something cannot be done."""
    try:
        yield
    except (typer.Exit, UnknownModelError):
        raise
    except errors as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def tell(text: str) -> None:
    """Say what was done; on stderr, so that stdout holds results only."""
    typer.echo(text, err=True)


def show(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table; numbers go to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    console.print(table)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
