"""Options of the command `swap` that say how images become tensors, as in timm."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Mean = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS", help="Mean of each channel, such as 0.5,0.5,0.5. Default: timm's."
    ),
]
Std = Annotated[
    str | None,
    typer.Option(metavar="NUMBERS", help="Standard deviation of each channel. Default: timm's."),
]
CropPct = Annotated[
    float | None,
    typer.Option(
        help="Crop this share of a resized image. Default: timm's; 1 where all images have "
        "the size of the input."
    ),
]
Interpolation = Annotated[
    Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None,
    typer.Option(help="How images are resized. Default: timm's."),
]
