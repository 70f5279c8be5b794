"""`TransferCallback` for transformers: the Trainer's optimizer follows a transfer schedule."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import ReferenceType, ref

from torch.optim import Optimizer

from transfer_surgery._messages import user_stacklevel
from transfer_surgery.frameworks.records import Schedule, make_schedule, record_totals
from transfer_surgery.reports import History
from transfer_surgery.transfer import TransferSchedule, structural_risk, wrap_optimizer

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "this callback needs transformers: pip install 'transfer-surgery[transformers]'"
    ) from error

_FURTHER = 0.01  # of the gates: what a schedule may be off


class TransferCallback(TrainerCallback):
    """Transfer the gates of a converted model while transformers' Trainer trains it.

    Convert the model before it goes to the Trainer. Gradient accumulation, mixed precision and
    ``train(resume_from_checkpoint=...)`` need nothing more. The Trainer creates its learning-rate
    scheduler before callbacks see the optimizer, so the gates stay in the parameter group that it
    gave them. For a `gate_lr` of their own, or for a constant gamma, pass
    ``optimizers=(wrap_optimizer(...), None)`` to the Trainer instead of using this callback.

    ``transfer/total`` and ``gate/total`` are added to what the Trainer logs: to ``log_history``,
    the console and all callbacks behind this one. Reporters such as TensorBoard's stand before it;
    ``trainer.add_callback(trainer.pop_callback(TensorBoardCallback))`` moves one behind.

    ``load_best_model_at_end`` may bring back a model whose gates are not transferred yet; a warning
    says so.

    Args:
        schedule: a function that makes the schedule from the Trainer's number of optimizer steps,
            ``state.max_steps``; by default `TransferSchedule` itself. Or a schedule.

    Attributes:
        history: `History` of the latest ``train()``, from where it began or was resumed.

    Raises:
        ValueError: at the start of a training: the model is not converted, or the optimizer was
            made before it was.
        ImportError: transformers is not installed.

    Examples:
        >>> callback = TransferCallback(lambda steps: TransferSchedule(steps, fraction=0.5))
        >>> # Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(self, schedule: Schedule = TransferSchedule) -> None:
        self.schedule = schedule
        self.history: History | None = None
        self._wrapped: tuple[ReferenceType[Optimizer], int] | None = None
        self._followed: TransferSchedule | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Wrap the optimizer. Its state is restored by now: a resumed one knows its step."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.history = History(model)
        if self._wrapped is None or self._wrapped[0]() is not optimizer:
            schedule = make_schedule(self.schedule, lambda: state.max_steps)
            wrap_optimizer(optimizer, model, transfer=schedule)
            self._followed = schedule
            self._wrapped = ref(optimizer), state.max_steps
        elif callable(self.schedule) and self._wrapped[1] != state.max_steps:
            # A Trainer keeps its optimizer from one train() to the next.
            raise ValueError(
                f"this optimizer follows a schedule of {self._wrapped[1]} steps, and this training "
                f"has {state.max_steps}: make a new Trainer."
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Warn where the Trainer has gone back to a model with other gates."""
        if not args.load_best_model_at_end or self._followed is None:
            return
        there = 1 - structural_risk(kwargs["model"], "mean").item()
        wanted = 1 - self._followed.budget(state.global_step)
        if there < wanted - _FURTHER:
            warnings.warn(
                f"load_best_model_at_end brought back {state.best_model_checkpoint}, in which "
                f"{there:.0%} of the gates are transferred, and {wanted:.0%} were at the end. Use "
                "load_best_model_at_end=False, or a metric that counts only from the end of the "
                "transfer on.",
                stacklevel=user_stacklevel(),
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the totals to what is logged of the training; the results of an evaluation stay."""
        logs: dict[str, float] = kwargs["logs"]
        if self.history is None or not {"loss", "train_loss"} & logs.keys():
            return
        totals = record_totals(self.history, state.global_step)
        logs |= totals
        state.log_history[-1] |= totals  # a copy of `logs`, made before callbacks see them
