"""The state of a training after an epoch, from which it continues bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transfer_surgery.files import check_replaceable, replace_file


def state_of(file: Path) -> Path:
    """The file with the state of the training of the model in `file`."""
    return file.with_suffix(".training.pt")


def check_state_not_lost(file: Path) -> None:
    """Raise where the place for the state of the training of a model is taken.

    Raises:
        ValueError: there is a file, and it is not the state of a training.
    """

    def check(state: Path) -> None:
        try:
            torch.load(state, map_location="cpu", weights_only=True, mmap=True)["settings"]
        except Exception as error:  # torch lets those of its readers through
            raise ValueError(f"{state} is not the state of a training.") from error

    check_replaceable(state_of(file), check)


class Checkpoint:
    """A file with all that changes in training; it is replaced as a whole after each epoch.

    Args:
        file: where it is kept; restored from where there is one.
        model: the model, converted and on its device.
        settings: plain values that must be the same when the training continues.
        saved: called after each save, to save the model itself.
    """

    def __init__(
        self, file: Path, model: nn.Module, settings: Mapping[str, Any], saved: Callable[[], None]
    ) -> None:
        self.file, self.model = file, model
        self.settings, self.saved = dict(settings), saved

    def save(self, epochs: int, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Keep the state after so many epochs."""
        state = {
            "epochs": epochs,
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }
        replace_file(self.file, lambda path: torch.save(state, path))
        self.saved()

    def restore(self, optimizer: Optimizer, scheduler: LRScheduler) -> int:
        """Load the state, if there is one, and return how many epochs are done.

        Raises:
            ValueError: the file is damaged, or of a training with other settings.
        """
        if not self.file.exists():
            return 0
        different: list[str] = []
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            there = dict(state["settings"])
            different += (
                f"{name} was {there.get(name)} and is {value} now"
                for name, value in self.settings.items()
                if there.get(name) != value
            )
            if not different:
                return self._load(state, optimizer, scheduler)
        except Exception as error:  # torch lets those of its readers through
            raise ValueError(
                f"{self.file} is damaged, or is not the state of a training."
            ) from error
        raise ValueError(
            f"{self.file}: {'; '.join(different)}. Continue with the same settings, or begin again "
            "with another file."
        )

    def _load(self, state: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler) -> int:
        self.model.load_state_dict(state["model"])
        scheduler.load_state_dict(state["scheduler"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"][0])
        if state["random"][1:]:
            torch.cuda.set_rng_state_all(state["random"][1:])
        return int(state["epochs"])
