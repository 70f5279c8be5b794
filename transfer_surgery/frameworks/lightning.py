"""`TransferCallback` for Lightning: its Trainer's optimizer follows a transfer schedule."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from transfer_surgery.frameworks.records import Schedule, make_schedule, record_totals
from transfer_surgery.reports import History
from transfer_surgery.transfer import TransferSchedule, wrap_optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "this callback needs Lightning: pip install 'transfer-surgery[lightning]'"
    ) from error


class TransferCallback(Callback):
    """Transfer the gates of a converted network while Lightning trains it.

    Convert the network in ``__init__`` of the LightningModule, or in ``configure_model``: before
    ``configure_optimizers``. Gradient accumulation, clipping, precision and resuming from a
    checkpoint (``fit(ckpt_path=...)``) need nothing more. If ``configure_optimizers`` returns a
    learning-rate scheduler, the gates stay in the parameter group that it gave them. For a
    `gate_lr` of their own, or for a constant gamma, call `wrap_optimizer` there, before the
    scheduler is created, instead of using this callback.

    Args:
        schedule: a function that makes the schedule from the Trainer's number of optimizer steps,
            ``estimated_stepping_batches``; by default `TransferSchedule` itself. Or a schedule.
        gate_lr: learning rate of the gates; by default that of the first parameter group.
        log_every: optimizer steps between records, which go to the Trainer's loggers as
            ``transfer/total`` and ``gate/total``; by default the Trainer's ``log_every_n_steps``.

    Attributes:
        history: `History` of the latest fit, from where it began or was resumed.

    Raises:
        ValueError: `log_every` is below 1; or at the start of a fit: the model is not converted, it
            has several optimizers, or the number of steps is not known.
        ImportError: Lightning is not installed.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> callback = TransferCallback(lambda steps: TransferSchedule(steps, fraction=0.5))
        >>> trainer = Trainer(max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False)
        >>> # trainer.fit(module, loader)
    """

    def __init__(
        self,
        schedule: Schedule = TransferSchedule,
        *,
        gate_lr: float | None = None,
        log_every: int | None = None,
    ) -> None:
        self.schedule, self.gate_lr = schedule, gate_lr
        if log_every is not None and log_every < 1:
            raise ValueError(f"log_every={log_every}: at least 1 step.")
        self.log_every = log_every
        self.history: History | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizer: it exists by now, and its state is restored after this hook."""
        optimizer = _only(trainer.optimizers)
        schedule = make_schedule(self.schedule, lambda: _total_steps(trainer, pl_module))
        wrap_optimizer(optimizer, pl_module, transfer=schedule, gate_lr=self.gate_lr)
        self.history = History(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        step = trainer.global_step
        every = self.log_every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step and step % every == 0:
            self._record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        assert self.history is not None
        step = trainer.global_step
        if self.history.records and self.history.records[-1].step == step:
            return  # a batch that was only accumulated, or the end of the training
        totals = record_totals(self.history, step)
        for logger in trainer.loggers:
            logger.log_metrics(totals, step=step)


def _only(optimizers: list[Optimizer]) -> Optimizer:
    if len(optimizers) == 1:
        return optimizers[0]
    raise ValueError(
        f"configure_optimizers gave {len(optimizers)} optimizers, and TransferCallback supports a "
        "single optimizer: call wrap_optimizer in configure_optimizers, on the one that trains the "
        "converted network, and leave out the callback."
    )


def _total_steps(trainer: Trainer, module: LightningModule) -> int:
    fix = "give TransferCallback(TransferSchedule(total_steps))"
    if not module.automatic_optimization:
        raise ValueError(
            "with manual optimization only training_step knows how often the optimizer steps: "
            f"{fix}."
        )
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise ValueError(
            "the number of steps is not known, since neither max_steps nor the length of "
            f"epochs and loader limits the training: {fix}."
        )
    return int(total)
