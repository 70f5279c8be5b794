"""What of a network `distill` trains, and the modes that it trains it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from transfer_surgery._running import as_written, hooked, modes_kept
from transfer_surgery.units import GatedActivation

TRAINED = ("all", "targets")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@contextmanager
def ready_to_learn(
    model: nn.Module, teacher: nn.Module, trained: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Both networks are in evaluation mode, except norms that follow their inputs.

    Other parameters are frozen. All of it is undone at the end. The networks run as written, since
    hooks look at their layers. Gradients are recorded, and those that
    the user has accumulated come back at the end.
    """
    learning = set(trained)
    every = (*model.parameters(), *teacher.parameters())
    others = {p: p.requires_grad for p in every if p not in learning}
    gradients = {p: p.grad for p in learning}
    try:
        for parameter in learning:
            parameter.grad = None
        for parameter in others:
            parameter.requires_grad_(False)
        checks = hooked(
            *(
                norm.register_forward_pre_hook(partial(_check_statistics, path), with_kwargs=True)
                for path, norm in model.named_modules()
                if isinstance(norm, nn.modules.batchnorm._BatchNorm)
            )
        )
        with modes_kept(model, teacher), as_written(), checks:
            model.eval()
            teacher.eval()
            for module in model.modules():
                if _follows(module, learning):
                    module.training = True
            with torch.inference_mode(False), torch.enable_grad():
                yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for parameter, wanted in others.items():
            parameter.requires_grad_(wanted)


def _follows(module: nn.Module, learning: Set[nn.Parameter]) -> bool:
    """Whether a module's statistics follow its inputs, or it learns in training mode alone."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        is_frozen = module.affine and learning.isdisjoint(module.parameters())
        return module.track_running_stats and bool(module.momentum) and not is_frozen
    return isinstance(module, nn.RNNBase)  # cuDNN has no gradients in evaluation mode


def _check_statistics(
    path: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise where a batch norm in training mode gets one value for each channel, as torch does."""
    x = next(iter((*args, *kwargs.values())))
    if norm.training and x.dim() > 1 and x.numel() == x.shape[1]:
        raise ValueError(
            f"{path}: this {type(norm).__name__} follows its inputs, and gets a single value for "
            f"each channel, {tuple(x.shape)}. Leave out batches of one example, as "
            "DataLoader(drop_last=True) does, or set its momentum to 0, which holds its statistics."
        )


def trained_parameters(
    model: nn.Module, units: Sequence[GatedActivation], train: str
) -> list[nn.Parameter]:
    """The parameters to train, without the gates' and without those that the user froze."""
    if train == "all":
        chosen = list(model.parameters())
    else:
        chosen = [p for unit in units if unit.fitted is not None for p in unit.fitted.parameters()]
        chosen += [p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters()]
    fixed = {p for unit in units for p in unit.gate.parameters()}
    trained = [p for p in dict.fromkeys(chosen) if p.requires_grad and p not in fixed]
    if not trained:
        raise ValueError("there is nothing to train: run match_targets first, or use train='all'.")
    return trained


@torch.no_grad()
def hold_amplitudes(units: Sequence[GatedActivation]) -> None:
    """Let no amplitude of a target without an offset get below 0, as `match_targets` leaves them.

    Layers around could not take a negative one everywhere, and the site would keep numbers.
    """
    for unit in units:
        if unit.fitted is not None and not unit.fitted.offset:
            unit.fitted.a.clamp_(min=0.0)
