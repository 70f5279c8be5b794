"""distill: the original network teaches the converted one, on inputs without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.hooks import RemovableHandle

from transfer_surgery._running import call_model, log_probabilities, logits_of, to_device_of
from transfer_surgery.units import GatedActivation, gated_activations

TRAINED = ("all", "targets")
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    train: str = "all",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    temperature: float = 4.0,
    features: Sequence[str] = (),
    feature_weight: float = 1.0,
    clip: float = 2.0,
) -> list[float]:
    """Train a converted model to answer as another one, by AdamW with a cosine schedule.

    The loss is the Kullback-Leibler divergence of the softened answers, times the square of the
    temperature (Hinton, Vinyals and Dean 2015); with `features`, plus the squared error of what
    modules inside the networks give, relative to its mean square. A few hundred steps after
    `match_targets` and `swap_targets` are worth several epochs with labels. Answers are logits:
    ``(N, classes)``, ``(N, tokens, classes)``, ``(N, classes, height, width)``; a single one is
    that of yes against no. For regression, other losses, optimizers or schedules write the loop:
    there is nothing special about it.

    Args:
        model: a converted model on its device; it is trained in training mode.
        teacher: the original network, such as a copy made before `convert`; it is run in evaluation
            mode and not changed.
        batches: inputs without labels, as for `match_targets`; gone through again and again.
            Shuffle and augment as for training.
        steps: optimizer steps.
        train: ``"all"`` parameters but the gates, or only ``"targets"`` and the scales and shifts
            of norm layers.
        lr: highest learning rate.
        weight_decay: of weights; targets and norm layers have none.
        temperature: by which both answers are softened.
        features: paths of modules that both networks have, such as the stages, whose outputs are
            compared too.
        feature_weight: of the mean of their relative squared errors; the divergence has weight 1.
        clip: highest norm of the gradient; 0: none.

    Returns:
        The loss of each step.

    Raises:
        ValueError: the model is not converted, or all its gates are at their source, an unknown
            ``train`` or module, no batches, or a gradient that is not finite.

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
    groups = _parameter_groups(model, units, train, weight_decay)
    trained = [p for group in groups for p in group["params"]]
    others = {p: p.requires_grad for p in model.parameters() if p not in set(trained)}
    # The gradients of norm layers and of sinusoids are ten times those of weights: SGD with a
    # clipped norm hardly moves the weights.
    optimizer = torch.optim.AdamW(groups, lr)
    schedule = CosineAnnealingLR(optimizer, steps)
    modes = [(m, m.training) for network in (model, teacher) for m in network.modules()]
    losses: list[float] = []
    watched = [_Outputs(network, features) for network in (model, teacher)]
    try:
        for outputs in watched:
            outputs.start()
        for parameter in others:
            parameter.requires_grad_(False)
        model.train()
        teacher.eval()
        for batch in _again(batches, steps):
            batch = to_device_of(model, batch)
            with torch.no_grad():
                answers = logits_of(call_model(teacher, batch))
            loss = softened_divergence(logits_of(call_model(model, batch)), answers, temperature)
            if features:
                loss = loss + feature_weight * _feature_loss(*watched)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained, clip if clip > 0 else torch.inf)
            if not norm.isfinite():
                raise ValueError(
                    f"step {len(losses)}: the gradient is not finite; use a lower lr than {lr}, or "
                    "look for NaN in the batches."
                )
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    finally:
        for outputs in watched:
            outputs.stop()
        for parameter, wanted in others.items():
            parameter.requires_grad_(wanted)
        for module, training in modes:
            module.training = training
    return losses


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean KL of softened answers, times the square of the temperature (Hinton et al. 2015).

    Args:
        logits: of the network that learns, of a shape that `log_probabilities` takes.
        wanted: the same, of the one that teaches.
        temperature: by which both are softened.
    """
    now, target = (log_probabilities(x, temperature) for x in (logits, wanted))
    return F.kl_div(now, target, log_target=True, reduction="batchmean") * temperature**2


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


def _parameter_groups(
    model: nn.Module, units: Sequence[GatedActivation], train: str, weight_decay: float
) -> list[dict[str, Any]]:
    """Weights, and what has no weight decay; gates are in neither."""
    gates = {p for unit in units for p in unit.gate.parameters()}
    light = [p for unit in units if unit.affine is not None for p in unit.affine.parameters()]
    light += [p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters()]
    heavy = [p for p in model.parameters() if p not in gates and p not in set(light)]
    groups: list[dict[str, Any]] = [{"params": light, "weight_decay": 0.0}]
    if train == "all":
        groups.append({"params": heavy, "weight_decay": weight_decay})
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("there is nothing to train: run match_targets first, or use train='all'.")
    return groups


def _again(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """So many batches, from the start where they end.

    Raises:
        ValueError: there are none, or an iterator is used up.
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
                "which can be gone through again."
            )
