"""distill: the original network teaches the converted one, on inputs without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.hooks import RemovableHandle

from transfer_surgery._arguments import check_arguments
from transfer_surgery._running import (
    call_model,
    kl_divergence,
    log_probabilities,
    logits_of,
    modes_kept,
    to_device_of,
)
from transfer_surgery.units import GatedActivation, gated_activations

TRAINED = ("all", "targets")
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_FEATURE_WEIGHT = 4.0  # of the mean relative squared error of the features, beside the divergence
_CLIP = 2.0  # highest norm of the gradient


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    train: str = "all",
    lr: float = 1e-3,
    temperature: float = 4.0,
    features: Sequence[str] = (),
) -> list[float]:
    """Train a converted model to answer as its original does, by AdamW with a cosine schedule.

    The loss is the Kullback-Leibler divergence of the softened answers, times the square of the
    temperature (Hinton, Vinyals and Dean 2015). With `features`, the relative squared errors of
    what modules inside the networks return are added. A few hundred steps after `match_targets` and
    `swap_targets` are worth several epochs with labels. The answers are read as logits:
    ``(N, classes)``, ``(N, tokens, classes)``, ``(N, classes, height, width)``; a single logit
    is read as yes or no. For regression, and for other losses, optimizers or schedules, write an
    ordinary training loop.

    Args:
        model: a converted model on its device; it is trained in training mode.
        teacher: the original network, such as a copy made before `convert`; it is run in evaluation
            mode and not changed.
        batches: inputs without labels, as for `match_targets`. They are repeated as often as
            needed; shuffle and augment them as for training.
        steps: number of optimizer steps.
        train: ``"all"`` parameters except the gates, or only ``"targets"``: the fitted targets and
            the scales and shifts of norm layers.
        lr: highest learning rate.
        temperature: what both answers are divided by before the softmax.
        features: paths of modules that both networks have, such as the stages, whose outputs are
            compared too.

    Returns:
        The loss of each step.

    Raises:
        ValueError: the model is not converted, all its gates are at their source, ``train`` or a
            module is unknown, there are no batches, or a gradient is not finite.

    Examples:
        >>> import copy
        >>> from transfer_surgery import convert, match_targets, swap_targets
        >>> _ = torch.manual_seed(0)
        >>> teacher = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> model, x = copy.deepcopy(teacher), torch.randn(256, 4)
        >>> _ = match_targets(convert(model, "sin", example_input=x), [x])
        >>> losses = distill(swap_targets(model), teacher, [x], steps=50)
        >>> losses[-1] < losses[0]
        True
    """
    check_arguments(distill, locals())
    # Refuse what cannot work before anything is changed.
    if train not in TRAINED:
        raise ValueError(f"train={train!r}: use 'all' or 'targets'.")
    if steps < 1 or temperature <= 0:
        raise ValueError(f"steps={steps}, temperature={temperature}: both have to be positive.")
    units = [unit for _, unit in gated_activations(model)]
    if all(bool((unit.gate.predict() == 1).all()) for unit in units):
        raise ValueError(
            "every gate is at its source, so that no target would be trained: call "
            "swap_targets(model) first."
        )
    trained = _trained_parameters(model, units, train)
    watched = [_Outputs(network, features) for network in (model, teacher)]

    # The gradients of norm layers and of sinusoids are ten times those of weights: SGD with a
    # clipped norm would hardly move the weights.
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    schedule = CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with _ready_to_learn(model, teacher, trained, watched):
        for batch in _repeated(batches, steps):
            # Compare the answers of both networks on the same batch.
            batch = to_device_of(model, batch)
            with torch.no_grad():
                answers = logits_of(call_model(teacher, batch))
            loss = softened_divergence(logits_of(call_model(model, batch)), answers, temperature)
            if features:
                loss = loss + _FEATURE_WEIGHT * _feature_loss(*watched)

            # Take one optimizer step.
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if not nn.utils.clip_grad_norm_(trained, _CLIP).isfinite():
                raise ValueError(
                    f"step {len(losses)}: the gradient is not finite; use a lower lr than {lr}, or "
                    "look for NaN in the batches."
                )
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@contextmanager
def _ready_to_learn(
    model: nn.Module,
    teacher: nn.Module,
    trained: Sequence[nn.Parameter],
    watched: Sequence[_Outputs],
) -> Iterator[None]:
    """Training mode, the teacher in evaluation mode, the other parameters frozen; undone after."""
    others = {p: p.requires_grad for p in model.parameters() if p not in set(trained)}
    try:
        for outputs in watched:
            outputs.start()
        for parameter in others:
            parameter.requires_grad_(False)
        with modes_kept(model, teacher):
            model.train()
            teacher.eval()
            yield
    finally:
        for outputs in watched:
            outputs.stop()
        for parameter, wanted in others.items():
            parameter.requires_grad_(wanted)


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean KL of softened answers, times the square of the temperature (Hinton et al. 2015).

    Args:
        logits: answers of the network that learns, of a shape that `log_probabilities` takes.
        wanted: answers of the one that teaches.
        temperature: what both are divided by.
    """
    now, target = (log_probabilities(x, temperature) for x in (logits, wanted))
    return kl_divergence(now, target) * temperature**2


class _Outputs:
    """The last output of some modules of a network."""

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        self.last: dict[str, Tensor] = {}
        modules = dict(network.named_modules())
        missing = [path for path in paths if path not in modules]
        if missing:
            raise ValueError(
                f"features={missing}: {type(network).__name__} has no such modules; take paths "
                "from named_modules() that the model and its teacher both have."
            )
        self._modules = {path: modules[path] for path in paths}
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._note(path)))

    def _note(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.last[path] = logits_of(output)

        return note

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


def _feature_loss(model: _Outputs, teacher: _Outputs) -> Tensor:
    errors = []
    for path, wanted in teacher.last.items():
        wanted = wanted.detach().float()
        error = (model.last[path].float() - wanted).square().mean()
        errors.append(error / wanted.square().mean().clamp_min(1e-12))
    return torch.stack(errors).mean()


def _trained_parameters(
    model: nn.Module, units: Sequence[GatedActivation], train: str
) -> list[nn.Parameter]:
    """The parameters to train, without the gates' and without those that the user froze."""
    if train == "all":
        gates = {p for unit in units for p in unit.gate.parameters()}
        chosen = [p for p in model.parameters() if p not in gates]
    else:
        chosen = [p for unit in units if unit.fitted is not None for p in unit.fitted.parameters()]
        chosen += [p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters()]
    trained = [p for p in dict.fromkeys(chosen) if p.requires_grad]
    if not trained:
        raise ValueError("there is nothing to train: run match_targets first, or use train='all'.")
    return trained


def _repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """One batch per step; the batches start again when they end.

    Raises:
        ValueError: there are no batches, or an iterator is used up.
    """
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise ValueError(
                f"batches: there are none after {done} of {steps} steps; give a list or a loader, "
                "which can be repeated."
            )
