"""swap_activations: the whole recipe in one call, from a trained network to plain modules.

Convert, fit, swap, let the original teach, bake and fold; after each stage the network is compared
with its original on inputs that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery._running import as_batches, copied
from transfer_surgery._tensors import check_learns
from transfer_surgery.activations import Activation, activation_module, get_target
from transfer_surgery.matching.distilling.distill_loss import Loss, loss_function
from transfer_surgery.matching.distilling.distillation import check_settings, distill
from transfer_surgery.matching.distilling.held_out import looked_at_first
from transfer_surgery.matching.match import match_targets
from transfer_surgery.matching.progress import Shown
from transfer_surgery.matching.swapping.source_budget import SourceBudget
from transfer_surgery.matching.swapping.stage_comparison import StageComparison
from transfer_surgery.matching.swapping.swap import swap_targets
from transfer_surgery.matching.swapping.swap_report import SwapReport, why_numbers_stay
from transfer_surgery.sites import Plan, find_activations
from transfer_surgery.surgery import (
    FoldReport,
    bake,
    check_model,
    convert,
    fold_targets,
    outcome_of,
    revert,
)
from transfer_surgery.units import Granularity, gated_activations

_SHARE = 4  # of so many batches of a list one is held out
_TEMPERATURE = 4.0  # of softened logits, as in `distill`


def swap_activations(
    model: nn.Module,
    target: str | Activation,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    labels: Iterable[Tensor] | None = None,
    logits: bool = False,
    plan: Plan | None = None,
    granularity: str | Granularity | Mapping[str, str | Granularity] = "channel",
    refit: bool = True,
    offset: bool | None = None,
    keep: int | float | None = None,
    keep_sites: int = 0,
    keep_points: float | None = None,
    distill_steps: int = 0,
    distill_on: Iterable[Any] | None = None,
    loss: str | Loss | None = None,
    lr: float = 1e-3,
    variation: float = 1.0,
    keep_gates: bool = False,
    progress: Shown = True,
) -> SwapReport:
    """Replace the activations of a trained network in one call, without labels.

    It calls `convert`, `match_targets`, `swap_targets`, `distill`, `bake` and `fold_targets`, and
    compares the network with its original after each of them. What is left is a network of plain
    modules: torch's own ones at the sites whose fitted numbers could all be folded.

    Args:
        model: a trained network, on its device. It is changed, and its weights, too, but for
            frozen ones, which are not refitted and take no fitted numbers.
        target: the activation that it shall have, such as ``"relu"`` or ``"hardswish"``.
        batches: inputs without labels, as for `match_targets`; some hundred examples are enough.
        held_out: other inputs, to compare both networks on; the outputs for them are kept in
            memory. None: the last quarter of `batches`, which is then not used for fitting.
        labels: the classes of the held-out examples, one tensor for each of these batches, so that
            the report has the accuracy. Nothing is trained with them.
        logits: whether the model returns logits of classes. The answers that change are counted
            then, and `distill` compares the answers. With `labels` it does in any case.
        plan: the sites to swap, chosen from `find_activations`; None: all hidden ones.
        granularity: what has fitted numbers of its own, as in `convert`.
        refit: whether the layers behind the sites are refitted.
        offset: whether the targets have an offset, as in `match_targets`. None: not where torch has
            a module of the target, such as ``nn.ReLU``, so that it can stand there without numbers.
        keep: how many neurons keep their source, as in `swap_targets`: a number (int) or a share
            (float). A site of which a part is kept computes both functions.
        keep_sites: how many sites keep their source as a whole: those that cost most when they are
            swapped alone (`sensitivity`).
        keep_points: keep as few of these sites as possible, such that at most so many points of
            accuracy (0.5 means 0.5 %) are lost before `distill`. It needs `labels`. The number is
            found by bisection; each look at one fits the network once more. The held-out examples
            choose it, so that their accuracy in the report is a little too good.
        distill_steps: number of steps in which the original network teaches the new one.
        distill_on: inputs for that, best many; None: `batches`.
        loss: what is taught, as in `distill`; None: ``"kl"`` for logits, else ``"relative"``.
        lr: highest learning rate of `distill`.
        variation: how much `distill` varies the inputs.
        keep_gates: leave the gates where they are, all at their target, and do not bake and fold
            the model. `save_baked`, which bakes and folds a copy, needs it so.
        progress: whether to show lines with the remaining time, or a function that gets each
            ``Progress``.

    Returns:
        A row per stage. The last one is of the baked and folded network, also with `keep_gates`.

    Raises:
        ValueError: an argument is out of its range, there is nothing to swap, the model is
            converted already, or there are no batches or NaN in them.
        TypeError: the model cannot be examined, or returns no floating tensor. After any error the
            model is as it was.

    Examples:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layers = nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 3)
        >>> model, x = nn.Sequential(*layers), 8 * torch.randn(512, 4)
        >>> found = swap_activations(model, "relu", x.split(64))
        >>> [row.stage for row in found]
        ['original', 'swapped alone', 'matched, refitted', 'baked, folded']
        >>> model[1], model[3]
        (ReLU(), ReLU())
    """
    check_arguments(swap_activations, locals())
    # Refuse what cannot work before anything is changed or long computed.
    check_model(model)
    if distill_steps or keep is not None:
        check_learns(model)
    target = get_target(target)
    budget = SourceBudget(keep, keep_sites, keep_points)
    if distill_steps < 0:
        raise ValueError(f"distill_steps={distill_steps}: give a number that is not below 0.")
    fitted_on = as_batches(batches, model)
    if held_out is None:
        fitted_on, held_out = _hold_out(fitted_on)
    else:
        # It is gone through once for each stage, and must give the same batches each time.
        held_out = [held_out] if isinstance(held_out, Tensor) else list(held_out)
    if plan is None:
        plan = find_activations(model, fitted_on[0]).select()
    plan = plan.filter(lambda site: site.source != target)
    if not plan.rows:
        raise ValueError(f"every activation selected is {target} already; choose another target.")
    budget.check(len(plan), labels is not None)

    if offset is None:
        offset = not type(activation_module(target)).__module__.startswith("torch.")
    logits = logits or labels is not None
    lesson = loss or ("kl" if logits else "relative")
    if distill_steps:
        check_settings(distill_steps, _TEMPERATURE, lr, variation)
        if distill_on is not None:
            distill_on = looked_at_first(model, distill_on)
    teacher = copied(model)
    roles = {site.role for site in plan}
    convert(model, target, plan=plan, roles=roles, granularity=granularity, seed=0)
    with _undone_on_errors(model, teacher):
        units = dict(gated_activations(model))
        budget.check_neurons(units.values())
        stages = StageComparison(teacher, units, held_out, labels, logits)
        if distill_steps:  # a loss that does not suit the outputs would end it after the match
            loss_function(lesson, stages.wanted, _TEMPERATURE)
        stages.add("original", model)
        with stages.timed():
            plain = swap_targets(copied(model))
        stages.add("swapped alone", plain)
        del plain

        # Fit the targets, and choose the sites that stay.
        with stages.timed():
            fit = partial(
                match_targets, batches=fitted_on, offset=offset, logits=logits, progress=progress
            )
            if budget:
                # The others are fitted around the sites that stay.
                budget.spend(model, fitted_on, logits, partial(fit, refit=refit), stages)
            left = fit(model, refit=refit).left
            if not budget:
                swap_targets(model)
        outcomes = {path: outcome_of(unit.gate.predict()) for path, unit in units.items()}
        fitted = sum(
            outcomes[path] != "source" and unit.fitted is not None for path, unit in units.items()
        )
        stages.add("matched, refitted" if refit else "matched", model, fitted)

        # The original network teaches the new one.
        if distill_steps:
            with stages.timed():
                distill(
                    model,
                    teacher,
                    fitted_on if distill_on is None else distill_on,
                    steps=distill_steps,
                    loss=lesson,
                    temperature=_TEMPERATURE,
                    lr=lr,
                    variation=variation,
                    progress=progress,
                )
            stages.add("distilled", model, fitted)

        # Bake and fold, first a copy: the model is as it was if it fails.
        with stages.timed():
            baked = copied(model)
            numbers = why_numbers_stay(_bake_and_fold(baked, fitted_on[0]))
        mixed = tuple(path for path, outcome in outcomes.items() if outcome == "mixed")
        stages.add("baked, folded", baked, len(numbers) + len(mixed))
    if not keep_gates:
        _bake_and_fold(model, fitted_on[0])
    kept = tuple(path for path, outcome in outcomes.items() if outcome == "source")
    return SwapReport(tuple(stages.rows), stages.examples, numbers, kept, mixed, left)


def _hold_out(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    if len(batches) < 2:
        raise ValueError(
            "there is 1 batch, of which none can be held out: give several, or held_out=."
        )
    number = max(len(batches) // _SHARE, 1)
    return batches[:-number], batches[-number:]


def _bake_and_fold(model: nn.Module, batch: Any) -> FoldReport:
    return fold_targets(bake(model), batch)


@contextmanager
def _undone_on_errors(model: nn.Module, original: nn.Module) -> Iterator[None]:
    """After an error the converted model has its activations and its weights back."""
    try:
        yield
    except BaseException:
        reverted = revert(model)
        with torch.inference_mode():  # it can write into what was made there, too
            reverted.load_state_dict(original.state_dict())
        raise
