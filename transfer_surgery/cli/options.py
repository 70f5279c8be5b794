"""What the commands share: options, and how errors end."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from transfer_surgery.files import ModelSpec, UnknownModelError
from transfer_surgery.sites import Plan

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The model: resnet50, timm:resnet50.a1_in1k, torchvision:resnet50 or "
        "path/to/module.py:function.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Pass an argument to the model, such as num_classes=10. Repeat it for several. "
        "Default: the model's own.",
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="CxHxW",
        help="Give the shape of one example, such as 3x64x64. Default: the zoo's own.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Load the weights from this .safetensors or .pth file. Default: random weights.",
        exists=True,
        dir_okay=False,
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained", help="Load the weights that the zoo offers. Default: random weights."
    ),
]
Source = Annotated[
    list[str] | None,
    typer.Option(help="Choose only these activations, such as relu. Repeatable. Default: all."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Choose only sites at these paths, such as 'layer1.*'. Repeatable. Default: all.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Leave out the sites at these paths. Repeatable. Default: none."
    ),
]
Role = Annotated[
    list[str] | None,
    typer.Option(
        help="Choose sites with this role: hidden, gating, output or bounding. Repeatable. "
        "Default: hidden."
    ),
]
Converted = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A file that [b]convert[/b] or save_model wrote.",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="Write to this file.", show_default=False),
]
GranularityName = Annotated[
    Literal["layer", "channel", "neuron"],
    typer.Option(help="Make gates, and fit numbers, for each layer, channel or neuron."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images in a batch.")]
Device = Annotated[str, typer.Option(help="Run on cpu, cuda, or auto: on cuda where there is one.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of a table. Default: a table.")
]


def model_spec(name: str, assignments: list[str] | None, input_size: str | None) -> ModelSpec:
    """The model that the arguments of a command describe."""
    arguments = {}
    for text in assignments or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise typer.BadParameter(f"{text!r}: write NAME=VALUE, such as num_classes=10.")
        value = {"true": "True", "false": "False"}.get(value, value)  # strings would both be true
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    if input_size is not None and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", input_size):
        raise typer.BadParameter(f"--input-size {input_size}: write a shape such as 3x64x64.")
    file, colon, function = name.rpartition(":")
    if file.endswith(".py"):  # the spec may be read in another folder
        name = f"{Path(file).resolve()}{colon}{function}"
    size = None if input_size is None else tuple(map(int, input_size.split("x")))
    with option_errors():
        return ModelSpec(name, arguments, size)


def choose(
    plan: Plan,
    source: list[str] | None,
    include: list[str] | None,
    exclude: list[str] | None,
    role: list[str] | None,
) -> Plan:
    """The sites that would be converted. A model without any is not an error of the options."""
    if not any((source, include, exclude, role)):
        with run_errors():
            return plan.select()
    with option_errors():
        return plan.select(
            source=source or None,
            include=include or None,
            exclude=exclude or None,
            roles=role or ("hidden",),
        )


@contextmanager
def option_errors() -> Iterator[None]:
    """Exit with status 2 and the message when an argument names something that does not exist."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


_ERRORS = (ValueError, TypeError, ImportError, OSError, RuntimeError)


@contextmanager
def run_errors(errors: tuple[type[Exception], ...] = _ERRORS) -> Iterator[None]:
    """Run what may fail, and exit with status 1 and the message, without a traceback, if it does.

    Names and arguments that no model has end with status 2.
    """
    try:
        yield
    except typer.Exit:
        raise
    except UnknownModelError as error:
        raise typer.BadParameter(str(error)) from error
    except errors as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
