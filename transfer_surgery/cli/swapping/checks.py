"""What the command `swap` reads from its arguments, and refuses before it fits anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer
from torch import Tensor, nn

from transfer_surgery._running import prediction_mode
from transfer_surgery.cli.printing import say
from transfer_surgery.matching import log_probabilities, logits_of
from transfer_surgery.sites import Plan


def budget_of(keep: str | None) -> int | float | None:
    """The number, or the share, of neurons that keep their source."""
    if keep is None:
        return None
    try:
        budget = int(keep) if keep.isdecimal() else float(keep)
    except ValueError:
        budget = -1
    if budget < 0 or (isinstance(budget, float) and not budget <= 1):
        raise ValueError(f"--keep {keep}: write a number of neurons, or a share such as 0.1.")
    return budget


def numbers_of(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text}: write numbers such as 0.5,0.5,0.5.") from error


def preprocessing_settings(
    mean: str | None, std: str | None, crop_pct: float | None, interpolation: str | None
) -> dict[str, Any]:
    """What the options say about how images become tensors; None: the model's own.

    Raises:
        ValueError: one of them is not to be understood, or no number that it can be.
    """
    deviations = numbers_of("--std", std)
    if not all(number > 0 for number in deviations or ()):
        raise ValueError(f"--std {std}: give numbers above 0.")
    if crop_pct is not None and not 0 < crop_pct <= 1:  # timm takes 0 for its default
        raise ValueError(f"--crop-pct {crop_pct}: give a share above 0, and 1 at most.")
    means = numbers_of("--mean", mean)
    if not all(0 <= number <= 1 for number in means or ()):
        raise ValueError(
            f"--mean {mean}: give numbers from 0 to 1, as pixels are here. Divide those of 8 bits "
            "by 255, and the numbers of --std, too."
        )
    return {"mean": means, "std": deviations, "crop_pct": crop_pct, "interpolation": interpolation}


def tell_without_effect(context: typer.Context, names: Collection[str]) -> None:
    """Say which of these options were given, though there is no teaching."""
    sources = {f"--{name}": context.get_parameter_source(name) for name in names}
    given = [option for option, source in sources.items() if source and source.name != "DEFAULT"]
    if given:
        say(f"{', '.join(given)}: without effect, since nothing is taught without --distill-steps.")


def check_folder(output: Path) -> None:
    """Raise where there is no folder for the output: minutes of work would go to a wrong place."""
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}. Make it first.")


def left_out(whole: Plan, chosen: Plan) -> str:
    """The sites that stay, counted by activation and role."""
    paths = {site.path for site in chosen}
    counts = Counter(
        f"{site.source.name} ({site.reason or site.role})"
        for site in whole
        if site.path not in paths
    )
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"; these stay: {listed}" if listed else ""


def size_of(example: Any) -> tuple[int, ...]:
    """The shape of one example.

    Raises:
        ValueError: the model takes no tensor.
    """
    if not isinstance(example, Tensor):
        raise ValueError(
            f"the model takes a {type(example).__name__}, and this command reads images; "
            "swap_activations in Python takes any inputs."
        )
    return tuple(example.shape[1:])


def ready_to_swap(network: nn.Module) -> nn.Module:
    """A network in float32, as images are; one that is frozen as a whole, for prediction, learns.

    Frozen layers would neither be refitted nor take fitted numbers.
    """
    network = network.float()
    parameters = [p for p in network.parameters() if p.is_floating_point()]
    if not any(p.requires_grad for p in parameters):
        for parameter in parameters:
            parameter.requires_grad_(True)
    return network


def answers_to(network: nn.Module, images: Tensor) -> Tensor:
    """What the model returns for some images.

    Raises:
        ValueError: it does not run on them.
    """
    try:
        with prediction_mode(network):
            return logits_of(network(images))
    except Exception as error:
        size = "x".join(map(str, images.shape[1:]))
        raise ValueError(
            f"the model does not run on images of {size}: {error}. Give the size that it takes: "
            "--input-size 3xHxW."
        ) from error


def check_classes(answers: Tensor, numbers: Collection[int], labels: Path | None) -> None:
    """Raise where the labels do not number the classes of the model.

    Folders are numbered in their order, so that all classes have to be there.
    """
    if labels is None:
        return
    classes = max(numbers) + 1
    known = log_probabilities(answers).shape[1] if answers.dim() <= 2 else 0
    if not (known == classes if labels.is_dir() else known >= classes):
        raise ValueError(
            f"{labels} has classes from 0 to {classes - 1}, and the model returns "
            f"{tuple(answers.shape[1:])} for an image: make it with --set num_classes={classes}, "
            "or give a CSV file with lines IMAGE,NUMBER."
        )
