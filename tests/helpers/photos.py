"""Folders of images to classify."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def draw_photos(folder: Path, number: int) -> None:
    """Dark and light images of noise, so many in a folder for each class."""
    for level, name in ((90, "dark"), (140, "light")):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = (level + 60 * torch.randn(16, 16, 3)).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
