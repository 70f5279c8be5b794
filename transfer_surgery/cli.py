"""The ``transfer-surgery`` command; its parts need the extras ``cli`` and ``plots``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install."""
    try:
        import rich  # noqa: F401 - typer prints with it
        import typer
    except ImportError:
        sys.exit("the commands need typer and rich: pip install 'transfer-surgery[cli]'")
    from transfer_surgery.reproduce.command import reproduce

    app = typer.Typer(
        name="transfer-surgery",
        help="Change the activation functions of a trained network without breaking it.",
        no_args_is_help=True,
    )

    # Otherwise typer takes a single group for the whole command.
    @app.callback()
    def _several() -> None: ...

    app.add_typer(reproduce, name="reproduce")
    app()
