"""The ``transfer-surgery`` command. It needs the extra ``cli``; `report --plot` needs ``plots``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install."""
    try:
        import rich  # noqa: F401 - typer prints with it
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the commands need typer and rich: pip install 'transfer-surgery[cli]'")
    from transfer_surgery.cli.app import app
    from transfer_surgery.cli.printing import redirect_descriptor

    redirect_descriptor()
    app()
