"""What the original network teaches: losses of two networks' outputs, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfer_surgery._tensors import map_tensors
from transfer_surgery.matching.answers import log_probabilities
from transfer_surgery.matching.output_errors import (
    OutputErrors,
    kl_divergence,
    output_tensors,
    paired_tensors,
)

Loss = Callable[[Any, Any], Tensor]
"""Takes the output of the network that learns, and that of the one that teaches."""

LOSSES = ("relative", "mse", "kl", "bce")


def loss_function(loss: str | Loss, outputs: Iterable[Any], temperature: float) -> Loss:
    """The function that a user chose.

    Args:
        loss: one of `LOSSES`, or a function.
        outputs: some outputs of the network that teaches, to see what they are.
        temperature: what logits are divided by before the softmax.

    Raises:
        ValueError: the loss does not suit the outputs.
        TypeError: the outputs have no floating tensors.
    """
    if not isinstance(loss, str):
        return partial(_number_of, loss)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: use {', '.join(LOSSES)}, or a function of two outputs.")
    if loss == "relative":
        errors = OutputErrors()
        for output in outputs:
            errors.add(output, output)
        scales = errors.scales()
        return lambda now, wanted: _squared_error(now, wanted, scales)
    if loss == "mse":
        return lambda now, wanted: _squared_error(now, wanted, {})
    tensors = [_the_tensor(loss, output) for output in outputs]
    inside = all(bool(((x >= 0) & (x <= 1)).all()) for x in tensors)
    if loss == "kl":
        if inside:
            raise ValueError(
                "loss='kl' takes logits, but all outputs of the teacher are between 0 and 1, as "
                "probabilities are. Use loss='bce' for these, or the default."
            )
        return lambda now, wanted: softened_divergence(
            _the_tensor(loss, now), _the_tensor(loss, wanted), temperature
        )
    if not inside:
        raise ValueError(
            "loss='bce' takes probabilities, but the teacher has outputs below 0 or above 1. "
            "Use loss='kl' for logits of which one is right, or the default."
        )
    return lambda now, wanted: _binary_divergence(_the_tensor(loss, now), _the_tensor(loss, wanted))


def _number_of(loss: Loss, now: Any, wanted: Any) -> Tensor:
    """What the user's function returns, which has to be one number that can be differentiated.

    Raises:
        TypeError: it is something else.
    """
    found: Any = loss(now, wanted)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise TypeError(
            f"the function given as loss= returns a {type(found).__name__}{shape}: let it return a "
            "tensor with one floating-point number, such as a mean."
        )
    learns: list[bool] = []
    map_tensors(lambda x: learns.append(x.requires_grad), now)
    if torch.is_grad_enabled() and any(learns) and not found.requires_grad:
        raise TypeError(
            "the number that the function given as loss= returns has no gradient: compute it from "
            "the first output by operations of torch, without item(), numpy or detach()."
        )
    return found.reshape(())


def _squared_error(now: Any, wanted: Any, scales: Mapping[str, float]) -> Tensor:
    """The mean over outputs of the mean squared error of each, divided by its scale."""
    errors = []
    for name, (ours, theirs) in paired_tensors(now, wanted).items():
        if ours.numel():
            used = (theirs != -torch.inf) | (ours != theirs)  # masked logits are -inf in both
            difference = torch.where(used, ours, 0.0).float() - torch.where(used, theirs, 0.0)
            errors.append(difference.square().mean() / scales.get(name, 1.0))
    return torch.stack(errors).mean() if errors else torch.zeros(())


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean KL of softened answers, times the square of the temperature (Hinton et al. 2015).

    Args:
        logits: answers of the network that learns, of a shape that `log_probabilities` takes.
        wanted: answers of the one that teaches.
        temperature: what both are divided by.
    """
    now, target = (log_probabilities(x, temperature) for x in (logits, wanted))
    return kl_divergence(now, target) * temperature**2


def _binary_divergence(now: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL divergence of probabilities of yes and no."""
    p, q = wanted.float(), now.float()
    tiny = torch.finfo(torch.float32).tiny
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    # Autocast refuses torch's own binary_cross_entropy.
    cross = -(p * q.clamp_min(tiny).log() + (1 - p) * (1 - q).clamp_min(tiny).log())
    divergence: Tensor = (cross - entropy).mean()
    return divergence


def _the_tensor(loss: str, output: Any) -> Tensor:
    """The one tensor of an output, or the one that is named ``logits``.

    Raises:
        ValueError: there are several.
    """
    tensors = output_tensors(output)
    if len(tensors) > 1 and "logits" not in tensors:
        raise ValueError(
            f"loss={loss!r} needs one output, but the teacher has {', '.join(tensors)}. Use the "
            "default, or a function of both networks' outputs that takes the right one."
        )
    return tensors["logits"] if "logits" in tensors else next(iter(tensors.values()))
