"""Which images there are in a folder, which classes they have, and what each is used for."""

from __future__ import annotations

import csv
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder reads."""

_SHARE = 4  # of so many images of one folder one is held out


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and below it, in order.

    Links to folders are followed, but no folder is gone through twice. Hidden files and folders,
    such as those of notebooks and file managers, are left out.

    Raises:
        ValueError: there are none.
    """
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        # Sorted, so that the order of a file system does not choose between two ways.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not found:
        raise ValueError(f"{folder} has no images. Known are {', '.join(EXTENSIONS)}.")
    return sorted(found)


def read_labels(labels: Path, folder: Path) -> dict[Path, int]:
    """The class of each image that has one.

    Args:
        labels: a folder ``CLASS/IMAGE``, whose classes are numbered in alphabetical order, as by
            torchvision's ImageFolder; or a CSV file with lines ``IMAGE,NUMBER``, with or without
            a heading.
        folder: where the images of a CSV file are.

    Raises:
        ValueError: there are no classes, a line is not to be understood, or an image has two
            classes.
    """
    return _of_folders(labels) if labels.is_dir() else _of_csv(labels, folder)


def _of_folders(labels: Path) -> dict[Path, int]:
    images = find_images(labels)
    # torchvision sorts "10" before "2", timm after it.
    classes = sorted({image.relative_to(labels).parts[0] for image in images})
    if any(image.parent == labels for image in images):
        raise ValueError(
            f"{labels} has images outside of folders of classes: put each into CLASS/, or give a "
            "CSV file with lines IMAGE,NUMBER."
        )
    if classes != sorted(classes, key=_natural):
        raise ValueError(
            f"{labels}: torchvision and timm number the classes {', '.join(classes[:4])} ... "
            "differently. Give a CSV file with lines IMAGE,NUMBER."
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return {image: numbers[image.relative_to(labels).parts[0]] for image in images}


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _of_csv(labels: Path, folder: Path) -> dict[Path, int]:
    found: dict[Path, int] = {}
    with labels.open(newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        try:
            lines = list(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{labels} is not a text with lines IMAGE,NUMBER: {error}.") from error
        for number, line in enumerate(lines, 1):
            if not line or (number == 1 and not _is_label(line)):
                continue
            image = folder / line[0]
            if not _is_label(line) or not image.is_file():
                raise ValueError(
                    f"{labels}, line {number}: {line} is not IMAGE,NUMBER, with an image "
                    f"of {folder} and the number of its class."
                )
            label = int(line[1])
            if found.setdefault(image, label) != label:
                raise ValueError(
                    f"{labels}, line {number}: {line[0]} has the class {label}, and before "
                    f"{found[image]}. Give each image one class."
                )
    if not found:
        raise ValueError(f"{labels} has no lines IMAGE,NUMBER.")
    return found


def _is_label(line: list[str]) -> bool:
    return len(line) == 2 and line[1].strip().isdecimal()


def split(
    images: Sequence[Path], candidates: Sequence[Path], fitted: int, held_out: int, seed: int
) -> tuple[list[Path], list[Path], list[Path]]:
    """Images to fit to, others to compare on, and all that may be learned from, drawn at random.

    Args:
        images: those that may be learned from.
        candidates: those that may be compared on, such as the ones with labels. Where they are
            among `images`, no more than a quarter of these are held out.
        fitted: number of images to fit to, if there are so many.
        held_out: the same of images to compare on.
        seed: of the choice.

    Raises:
        ValueError: there are too few.
    """
    drawn = random.Random(seed)
    known = {image.resolve() for image in images}
    shared = any(image.resolve() in known for image in candidates)
    most = len(images) // _SHARE if shared else len(candidates)
    chosen = drawn.sample(candidates, min(held_out, most, len(candidates)))
    aside = {image.resolve() for image in chosen}
    rest = [image for image in images if image.resolve() not in aside]
    if not chosen or not rest:
        raise ValueError(f"there are {len(images)} images, of which some are held out: give more.")
    return drawn.sample(rest, min(fitted, len(rest))), chosen, rest
