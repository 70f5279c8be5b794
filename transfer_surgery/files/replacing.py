"""Files that are replaced as a whole, and only where nothing of another program is lost."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def check_replaceable(file: Path, check: Callable[[Path], object]) -> None:
    """Raise where something would be lost. A file that is missing or empty can be replaced.

    Args:
        file: the file that is to be written.
        check: is called with the file, and raises ValueError or FileNotFoundError where it is not
            of the kind to be written.

    Raises:
        ValueError: `check` raised; the message is the same, with advice.
    """
    if not file.exists() or (file.is_file() and file.stat().st_size == 0):
        return
    try:
        check(file)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error} It is not replaced: choose another file.") from error


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Replace a file as a whole: at any moment its name means the old or the new content.

    The new file keeps the mode of the old one. Where the name is a symbolic link, the file that it
    points to is replaced.

    Args:
        file: the file; folders on the way to it are made.
        write: is called with a path in a new folder, which only this user can read, and writes
            there. What it writes beside that path goes beside the file.
    """
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
        write(Path(folder, file.name))
        # A file beside it, whose name is longer, comes first: the file itself refers to it.
        for written in sorted(Path(folder).iterdir(), reverse=True):
            with written.open("rb+") as opened:
                os.fsync(opened.fileno())
            place = file.with_name(written.name)
            if place.exists():
                shutil.copymode(place, written)
            os.replace(written, place)
    if os.name == "posix":  # the new name is on the disk only once its folder is
        folder_number = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder_number)
        finally:
            os.close(folder_number)
