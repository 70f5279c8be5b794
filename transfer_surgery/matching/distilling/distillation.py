"""distill: the original network teaches the converted one, on inputs without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from transfer_surgery._messages import check_arguments, listed
from transfer_surgery._randomness import RandomnessKept
from transfer_surgery._running import to_device_of
from transfer_surgery._tensors import check_learns
from transfer_surgery.matching.distilling.batch_gradients import KL_WEIGHT, BatchGradients
from transfer_surgery.matching.distilling.distill_loss import Loss, loss_function
from transfer_surgery.matching.distilling.distill_report import (
    SMALL,
    DistillReport,
    overflow_remains,
    warn_of_no_gain,
    warn_of_overflow,
)
from transfer_surgery.matching.distilling.held_out import (
    Asked,
    Examination,
    hold_out,
    repeated,
    teach,
)
from transfer_surgery.matching.distilling.layer_outputs import (
    check_compared,
    first_shapes,
    layers_to_compare,
)
from transfer_surgery.matching.distilling.polynomial_range import FittedRanges
from transfer_surgery.matching.distilling.trained import (
    TRAINED,
    hold_amplitudes,
    ready_to_learn,
    trained_parameters,
)
from transfer_surgery.matching.distilling.variation import bearable_variation, varied
from transfer_surgery.matching.progress import Shown, progress_line
from transfer_surgery.units import gated_activations

_CLIP = 2.0  # highest norm of the gradient
_WARMUP = 0.05  # share of the steps in which the learning rate rises
_LOOKS = 20  # how often the network is compared with its teacher in evaluation mode
_VARIED = 0.5  # share of the examples that are varied
_WORSE = 3.0  # times the loss at the start, from which on training goes back


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    loss: str | Loss = "relative",
    train: str = "all",
    lr: float = 1e-3,
    temperature: float = 4.0,
    features: Sequence[str] | None = None,
    variation: float = 1.0,
    progress: Shown = True,
) -> DistillReport:
    """Train a converted model to answer as its original does, by AdamW.

    The outputs of both networks may be of any kind: a tensor, or tensors in containers or objects.
    The default loss is the mean of the relative squared errors of all of them, which suits logits,
    probabilities, boxes, energies and forces alike. What the layers inside return is compared, too.
    A few hundred steps after `match_targets` and `swap_targets` are worth several epochs with
    labels.

    Some batches are held out. The networks are compared on them in evaluation mode 20 times, and
    the best state is kept: of those that answer the given inputs as well as the start does, the one
    that answers varied inputs best. That may be the start. An error, or Ctrl-C, ends with the best
    state until then.

    The model is trained in evaluation mode: without dropout, and with the branches that predictions
    take. Only batch norms that follow their inputs (a momentum above 0, and not frozen) use the
    statistics of the batch. The learning rate rises during 5 % of the steps, then falls like a
    cosine. What `torch.compile` has made runs as written meanwhile, in all threads.

    An input outside of the range of a polynomial's fit grows from site to site. So, as in training
    mode, polynomials are constant beyond twice their range, and the loss has a penalty on inputs
    outside of it; the ranges stay. The networks are compared without bounds. A network that
    overflows then is trained nonetheless, since any finite answer is better.

    Args:
        model: a converted model on its device.
        teacher: the original network, such as a copy made before `convert`; it is run in evaluation
            mode and not changed.
        batches: inputs without labels, as for `match_targets`. They are repeated as often as
            needed; shuffle and augment them as for training. Of a list of eight or more the last
            eighth is held out; of others the first eight are looked at, and trained on as well.
        steps: number of optimizer steps.
        loss: ``"relative"``; ``"mse"``, the mean of the mean squared errors; ``"kl"``, the
            Kullback-Leibler divergence of softened logits, times the square of the temperature
            (Hinton, Vinyals and Dean 2015); ``"bce"``, the divergence of probabilities of yes and
            no, such as sigmoids; or a function that takes the outputs of the model and of the
            teacher and returns a number. For ``"kl"``, classes are along the last axis of three,
            else along the second; a single logit is read as yes or no.
        train: ``"all"`` parameters except the gates, or only ``"targets"``: the fitted targets and
            the scales and shifts of norm layers.
        lr: highest learning rate. Wherever the network has got much worse, it is halved together
            with the variation, and training goes on from the best state.
        temperature: what logits are divided by before the softmax, for ``"kl"``.
        features: paths of modules that both networks have, whose outputs are compared; None: all
            linear layers and convolutions; an empty list: none.
        variation: how much half of the floating inputs are mixed with others of their batch,
            stretched, and made noisy: from 0 to 1. Channels of images (four axes or more) also get
            another light each. It is halved until the teacher's outputs look as those for the given
            inputs. Use 0 where there are many inputs, or where you augment them.
        progress: whether to show a line with the remaining time, or a function that gets each
            ``Progress``.

    Returns:
        The loss of each step, with the errors of the outputs before and after.

    Raises:
        ValueError: the model is not converted, all its gates are at their source, a polynomial was
            not fitted, an argument is unknown or does not suit the outputs, there are no batches,
            the outputs are not finite, or polynomials overflow to the end.
        TypeError: the outputs have no floating tensors, or those of the two networks differ in kind
            or shape.

    Warns:
        DistillWarning: polynomials overflow at the start, no state was better than the start, or
            an output got worse.

    Examples:
        >>> import copy
        >>> from transfer_surgery import convert, swap_targets
        >>> _ = torch.manual_seed(0)
        >>> teacher = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> model, x = copy.deepcopy(teacher), torch.randn(256, 4)
        >>> model = swap_targets(convert(model, "sin", example_input=x))
        >>> found = distill(model, teacher, x.split(32), steps=100, lr=0.01)
        >>> found.after["output"] < 0.5 * found.before["output"]
        True
    """
    check_arguments(distill, locals())
    # Refuse what cannot work before anything is changed.
    if train not in TRAINED:
        raise ValueError(f"train={train!r}: use 'all' or 'targets'.")
    check_settings(steps, temperature, lr, variation)
    check_learns(model)
    units = [unit for _, unit in gated_activations(model)]
    if all(bool((unit.gate.predict() == 1).all()) for unit in units):
        raise ValueError(
            "every gate is at its source, so that no target would be trained: call "
            "swap_targets(model) first."
        )
    ranges = FittedRanges(model)
    trained = trained_parameters(model, units, train)
    if not set(trained).isdisjoint(teacher.parameters()):
        raise ValueError(
            "the teacher has parameters of the model, and would change as it does: give a copy of "
            "the original, which copy.deepcopy(model) makes before convert."
        )
    layers = layers_to_compare(model, teacher, features)
    batches, looked_at = hold_out(batches)
    looked_at = [to_device_of(model, batch) for batch in looked_at]

    with ready_to_learn(model, teacher, trained), RandomnessKept() as kept:
        # Ask both about the held-out batches.
        with first_shapes(layers.teacher) as theirs:
            given = [
                Asked(batch, teach(teacher, batch, f"held-out batch {number}"))
                for number, batch in enumerate(looked_at)
            ]
        compare = loss_function(loss, [asked.output for asked in given], temperature)
        strength, further = bearable_variation(teacher, given, variation)
        examination = Examination(model, trained, compare, given, further)
        with first_shapes(layers.model) as ours:
            usual = start = now_at = examination.look(0)
        check_compared(features or (), ours, theirs)
        far = ""
        if start == math.inf:
            check_finite(model)
            usual, far = ranges.look_within_bounds(examination)
            warn_of_overflow(far)
        before = examination.errors

        # Train. The gradients of norm layers and of sinusoids are ten times those of weights: SGD
        # with a clipped norm would hardly move the weights.
        optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
        losses: list[float] = []
        show = progress_line(progress, "distill", steps)
        small = SMALL if loss in ("relative", "kl", "bce") else 0.0  # others have a unit
        weight = KL_WEIGHT if loss == "kl" else 1.0
        gradients = BatchGradients(model, teacher, trained, compare, layers, ranges, weight)
        with examination.best_at_the_end(), show as tell:
            for step, batch in enumerate(kept.outside(repeated(batches, steps)), 1):
                batch = varied(to_device_of(model, batch), strength, _VARIED)
                optimizer.param_groups[0]["lr"] = lr * _rate((step - 0.5) / steps)
                found = gradients.compute(batch, step)
                finite = nn.utils.clip_grad_norm_(trained, _CLIP).isfinite()
                if finite:
                    optimizer.step()
                    hold_amplitudes(units)
                losses.append(found.item())

                # Look at the held-out batches; go back where training has gone astray.
                if not finite or step * _LOOKS // steps > (step - 1) * _LOOKS // steps:
                    now_at = examination.look(step) if finite else math.inf
                    if now_at > (limit := _WORSE * max(usual, small)):
                        with ranges.bounded():
                            # An overflow without bounds alone does not spoil the training.
                            if not finite or examination.loss() > limit:
                                examination.go_back()
                                optimizer.state.clear()
                                lr, strength = lr / 2, strength / 2
                tell(step, f"loss {losses[-1]:.3g}, held out {now_at:.3g}, at first {start:.3g}")
        if far and examination.loss() == math.inf:
            raise ValueError(overflow_remains(steps, far))
    report = DistillReport(losses, before, examination.errors, examination.step, strength)
    warn_of_no_gain(report)
    return report


def check_settings(steps: int, temperature: float, lr: float, variation: float) -> None:
    """Raise ValueError where a number is out of its range."""
    if steps < 1 or temperature <= 0 or lr <= 0:
        raise ValueError(f"steps={steps}, temperature={temperature}, lr={lr}: use positive ones.")
    if not 0 <= variation <= 1:
        raise ValueError(f"variation={variation}: use a number from 0 to 1.")


def check_finite(model: nn.Module) -> None:
    """Raise ValueError where a network holds numbers that no output survives."""
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    # Infinite numbers of a buffer may be a mask.
    bad += [name for name, buffer in model.named_buffers() if bool(buffer.isnan().any())]
    if bad:
        raise ValueError(
            f"{listed(bad)} hold NaN or infinite numbers: load a checkpoint of the model without."
        )


def _rate(done: float) -> float:
    """The share of the highest learning rate after this share of the steps."""
    if done < _WARMUP:
        return done / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP)))
