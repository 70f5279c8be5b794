"""The weights of a model: a checkpoint, as training scripts leave it, or those of the zoo."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from transfer_surgery.cli.printing import say
from transfer_surgery.files import ModelSpec, check_is_file, load_weights, read_tensors

# Under which training scripts keep the weights; timm's keeps averaged ones, too, which are better.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What DistributedDataParallel and torch.compile put before every name, in either order; so does
# AveragedModel.
_PREFIXES = re.compile(r"^(_orig_mod\.)?(module\.)?(_orig_mod\.)?")
# The count that torch.optim.swa_utils.AveragedModel keeps beside its module.
_AVERAGED = "n_averaged"


def check_weights(weights: Path | None, pretrained: bool) -> None:
    """Raise where two kinds of weights are asked for."""
    if weights is not None and pretrained:
        raise typer.BadParameter("give --weights or --pretrained, not both.")


def build(spec: ModelSpec, weights: Path | None, pretrained: bool) -> nn.Module:
    """Make a model with the weights of a checkpoint, those of the zoo, or random ones.

    Raises:
        ValueError: the checkpoint cannot be read, or does not fit the model.
    """
    model = spec.build(pretrained)
    if weights is not None:
        load_weights(model, read_weights(weights, model.state_dict()), weights)
    elif not pretrained:
        own = f"those that {spec.name} makes" if ".py:" in spec.name else "random"
        say(f"The weights are {own}: neither --weights nor --pretrained was given.")
    return model


def read_weights(file: Path, own: Collection[str]) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file or one of `torch.save`; no code in it is run.

    Args:
        file: the file.
        own: the names that the model has, which stay as they are.

    Raises:
        ImportError: safetensors is needed and not installed.
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, or holds no tensors by name.
    """
    if file.suffix == ".safetensors":
        return _state(read_tensors(file)[1], file, own)
    check_is_file(file)
    try:
        # timm's train.py keeps its arguments beside the weights; a Namespace runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch lets those of its readers through: KeyError, EOFError ...
        text = str(error).strip()
        refused = re.search(r"GLOBAL (\S+) was not", text)  # in a page of advice
        why = f"it holds a {refused[1]}" if refused else re.split(r"\. |\n", text)[0]
        why = why or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as a checkpoint of tensors alone ({why}). Save "
            "model.state_dict()."
        ) from error
    return _state(held, file, own)


def _state(held: Any, file: Path, own: Collection[str]) -> dict[str, Tensor]:
    if isinstance(held, Mapping):
        inner = next((held[key] for key in _KEYS if isinstance(held.get(key), Mapping)), held)
        state = {
            str(key) if key in own else _PREFIXES.sub("", str(key)): value
            for key, value in inner.items()
        }
        if all(str(key).startswith("module.") for key in inner if key != _AVERAGED):
            state.pop(_AVERAGED, None)
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return state
    raise ValueError(
        f"{file} holds a {type(held).__name__}, which is not a state dict of names and tensors."
    )
