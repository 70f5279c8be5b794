"""`TransferCallback` for transformers: the Trainer's optimizer follows a transfer schedule."""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

from torch.optim import Optimizer

from transfer_surgery.frameworks.settings import TransferSettings, record_totals
from transfer_surgery.reports import History
from transfer_surgery.transfer import TransferSchedule

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "this callback needs transformers: pip install 'transfer-surgery[transformers]'"
    ) from error


class TransferCallback(TrainerCallback):
    """Transfer the gates of a converted model while transformers' Trainer trains it.

    Convert the model before it goes to the Trainer. Gradient accumulation, mixed precision and
    ``train(resume_from_checkpoint=...)`` need nothing more. The Trainer creates its learning-rate
    scheduler before callbacks see the optimizer, so the gates stay in the parameter group that it
    gave them. For a `gate_lr` of their own pass ``optimizers=(wrap_optimizer(...), None)`` to the
    Trainer instead of using this callback.

    ``transfer/total`` and ``gate/total`` are added to what the Trainer logs: to ``log_history``,
    the console and all callbacks behind this one. Reporters such as TensorBoard's stand before it;
    ``trainer.add_callback(trainer.pop_callback(TensorBoardCallback))`` moves one behind.

    Args:
        transfer: a schedule; by default one over the Trainer's ``state.max_steps``.
        settings: arguments of `TransferSchedule` (without `total_steps`) and of `wrap_optimizer`.

    Attributes:
        history: `History` of the latest ``train()``, from where it began or was resumed.

    Raises:
        TypeError: a setting is unknown.
        ValueError: the settings exclude each other, or at the start of a training: the model is
            not converted, or the optimizer was made before it was.
        ImportError: transformers is not installed.

    Examples:
        >>> callback = TransferCallback(fraction=0.5, end=0.8)
        >>> # Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(self, transfer: TransferSchedule | None = None, **settings: Any) -> None:
        self.settings = TransferSettings.of(transfer, settings)
        self.history: History | None = None
        self._wrapped: tuple[ReferenceType[Optimizer], int] | None = None

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
            self.settings.wrap(optimizer, model, state.max_steps)
            self._wrapped = ref(optimizer), state.max_steps
        elif self.settings.counts_steps and self._wrapped[1] != state.max_steps:
            # A Trainer keeps its optimizer from one train() to the next.
            raise ValueError(
                f"this optimizer follows a schedule of {self._wrapped[1]} steps, and this training "
                f"has {state.max_steps}: make a new Trainer."
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
