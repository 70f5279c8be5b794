"""Checks of files before they are used, and replacement of a file as a whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def check_is_file(file: Path) -> None:
    """Raise where there is no file, or something else has its name, or this user may not read it.

    Raises:
        FileNotFoundError: there is no file.
        PermissionError: the file cannot be read.
    """
    if not file.is_file():
        why = "is a folder" if file.is_dir() else "is not a file" if file.exists() else ""
        raise FileNotFoundError(f"{file} {why or 'does not exist'}.")
    file.open("rb").close()  # safetensors says of a file that it may not read that there is none


def check_replaceable(file: Path, check: Callable[[Path], object]) -> None:
    """Raise where something would be lost. A file that is missing or empty can be replaced.

    Args:
        file: the file that is to be written.
        check: is called with the file, and raises ValueError where it is not of the kind to be
            written.

    Raises:
        ValueError: `check` raised, or there is a folder; the message is the same, with advice.
        PermissionError: this user may not read the file.
    """
    if not file.exists() or (file.is_file() and file.stat().st_size == 0):
        return
    try:
        check_is_file(file)
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

    Raises:
        OSError: the file cannot be written, as on a full disk, or one that goes beside it exists
            already while the file is not there or empty. All is then as it was, and there are no
            new folders.
    """
    made: list[Path] = []
    try:
        file = file.resolve()
        made += (folder for folder in file.parents if not folder.exists())
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
            write(Path(folder, file.name))
            # A file beside it, whose name is longer, comes first: the file itself refers to it.
            places = {
                file.with_name(written.name): written
                for written in sorted(Path(folder).iterdir(), reverse=True)
            }
            if not (file.exists() and file.stat().st_size):  # else they are the old file's
                for place in places.keys() - {file}:
                    if place.exists():
                        raise FileExistsError(
                            f"{place} goes beside it and exists. It is not replaced: choose "
                            "another file."
                        )
            for place, written in places.items():
                _replace(place, written)
        _sync(file.parent, os.O_RDONLY)  # the new name is on the disk only once its folder is
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        with suppress(OSError):  # another process may have put something there
            for path in made:
                path.rmdir()
        raise OSError(f"{file} cannot be written: {error}") from error


def _replace(file: Path, new: Path) -> None:
    usual = new.with_name(".usual")  # safetensors makes files that only this user can read
    usual.touch()
    shutil.copymode(file if file.exists() else usual, new)
    _sync(new, os.O_RDWR)
    os.replace(new, file)


def _sync(path: Path, flags: int) -> None:
    """Wait until a file or a folder is on the disk."""
    if os.name == "posix" or path.is_file():  # other systems open no folders
        opened = os.open(path, flags)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
