"""TransferCallback in Lightning's own Trainer, against the same training in a plain loop."""

import csv
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.helpers.same_bits import assert_same_bits
from tests.helpers.schedules import half, half_early
from transfer_surgery import TransferSchedule, convert, report, wrap_optimizer
from transfer_surgery.frameworks.lightning import TransferCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning 2.6.6 with torch 2.15
)
BATCHES = 7  # uneven, so that the last accumulation of an epoch is a short one
EPOCHS = 4


def converted():
    generator = torch.Generator().manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    torch.manual_seed(1)  # of the gates' initial values
    return convert(network, "sin", example_input=torch.zeros(1, 4))


def loader():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(BATCHES * 8, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=8)


class Module(LightningModule):
    """A converted network, a loss and an optimizer."""

    def __init__(self, scheduled=False):
        super().__init__()
        self.network = converted()
        self.scheduled = scheduled

    def training_step(self, batch, batch_idx):
        # Lightning does not keep the state of the generators in its checkpoints.
        torch.manual_seed(self.current_epoch * BATCHES + batch_idx)
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self):
        optimizer = adamw(self)
        if not self.scheduled:
            return optimizer
        return [optimizer], [StepLR(optimizer, 2, gamma=0.5)]  # stepped at the end of each epoch


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def fit(module, *callbacks, data=None, epochs=EPOCHS, ckpt_path=None, **trainer):
    settings = {
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": epochs,
    }
    result = Trainer(**settings | trainer, callbacks=list(callbacks))
    result.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return result


def plain_loop(schedule, accumulate=1, clip=None, bf16=False, scheduled=False):
    """What Lightning does, written out."""
    network = converted()
    optimizer = adamw(network)
    scheduler = StepLR(optimizer, 2, gamma=0.5) if scheduled else None
    wrap_optimizer(optimizer, network, transfer=schedule)
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    for epoch in range(EPOCHS):
        for i, (inputs, labels) in enumerate(loader()):
            torch.manual_seed(epoch * BATCHES + i)
            with autocast:
                loss = nn.functional.cross_entropy(network(inputs), labels)
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i + 1 < BATCHES:
                continue
            if clip is not None:
                groups = optimizer.param_groups  # in their order: the norm is a rounded sum
                nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return network


@pytest.mark.parametrize(
    ("trainer", "loop", "steps"),
    [
        ({}, {}, 28),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}, 16),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}, 28),
        ({"precision": "bf16-mixed"}, {"bf16": True}, 28),
        (
            {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
            {"accumulate": 3, "clip": 0.1},
            12,
        ),
    ],
    ids=["plain", "accumulation", "clipping", "bf16", "accumulation and clipping"],
)
def test_training_is_that_of_the_plain_loop_bit_for_bit(trainer, loop, steps):
    module, callback = Module(), TransferCallback(half_early)
    fit(module, callback, **trainer)
    expected = plain_loop(TransferSchedule(steps, fraction=0.5, end=0.8), **loop)
    assert_same_bits(module.network, expected)
    assert report(module).total.transferred == 0.5
    assert callback.history.records[-1].step == steps


def test_with_a_scheduler_the_gates_keep_their_group_and_training_is_that_of_the_plain_loop():
    module = Module(scheduled=True)
    trainer = fit(module, TransferCallback(half))
    assert len(trainer.optimizers[0].param_groups) == 1
    assert_same_bits(module.network, plain_loop(TransferSchedule(28, fraction=0.5), scheduled=True))


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_resumed_training_ends_like_an_uninterrupted_one_bit_for_bit(tmp_path, scheduled):
    whole = Module(scheduled)
    fit(whole, TransferCallback())

    class Stop(TransferCallback):
        def on_train_batch_end(self, trainer, *args, **kwargs):
            super().on_train_batch_end(trainer, *args, **kwargs)
            trainer.should_stop = trainer.global_step >= 2 * BATCHES

    half = Module(scheduled)
    fit(half, Stop()).save_checkpoint(tmp_path / "half.ckpt")
    assert 0 < report(half).total.transferred < 1
    resumed, callback = Module(scheduled), TransferCallback()
    trainer = fit(resumed, callback, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 4 * BATCHES
    assert_same_bits(resumed, whole)
    assert report(resumed).total.transferred == 1
    assert callback.history.records[0].step > 2 * BATCHES


def test_totals_go_to_the_loggers_and_the_history(tmp_path):
    callback = TransferCallback(log_every=10)
    logger = CSVLogger(tmp_path)
    fit(Module(), callback, logger=logger, log_every_n_steps=7)
    assert [record.step for record in callback.history.records] == [10, 20, 28]
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["gate/total"]]
    assert [int(row["step"]) for row in rows] == [10, 20, 28]
    assert float(rows[-1]["transfer/total"]) == 1
    expected = [record.report.total.mean_gate for record in callback.history.records]
    assert [float(row["gate/total"]) for row in rows] == pytest.approx(expected)


def test_by_default_it_records_as_often_as_the_trainer_logs_each_step_once():
    callback = TransferCallback()
    fit(Module(), callback, log_every_n_steps=4, accumulate_grad_batches=2)
    assert [record.step for record in callback.history.records] == [4, 8, 12, 16]


def test_a_given_schedule_and_gate_lr_are_used_as_they_are():
    module = Module()
    fit(module, TransferCallback(TransferSchedule(10)), max_steps=10)
    assert report(module).total.transferred == 1
    trainer = fit(Module(), TransferCallback(gate_lr=1.5), max_steps=10)
    assert trainer.optimizers[0].param_groups[-1]["lr"] == 1.5


def test_a_second_fit_of_the_same_module_replaces_the_optimizer():
    module = Module()
    first = fit(module, TransferCallback(half), max_steps=10)
    module.network[1].log_alpha.data.fill_(8.0)
    second = fit(module, TransferCallback(), max_steps=10)
    assert first.optimizers[0] is not second.optimizers[0]
    assert report(module).total.transferred == 1


def test_each_fit_has_its_own_optimizer_and_history():
    callback = TransferCallback(log_every=7)
    fit(Module(), callback, epochs=1)
    first = callback.history
    module = Module()
    fit(module, callback, epochs=2)
    assert [len(first), len(callback.history)] == [1, 2]
    assert report(module).total.transferred == 1


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_needs_a_schedule_and_works_with_one():
    with pytest.raises(
        ValueError, match=r"give TransferCallback\(TransferSchedule\(total_steps\)\)"
    ):
        fit(Manual(), TransferCallback())
    module = Manual()
    fit(module, TransferCallback(TransferSchedule(28)))
    assert_same_bits(module.network, plain_loop(TransferSchedule(28)))


def test_a_training_without_end_needs_a_schedule():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    with pytest.raises(ValueError, match="the number of steps is not known"):
        fit(Module(), TransferCallback(), data=DataLoader(Endless(), batch_size=8), epochs=1)


def test_several_optimizers_are_refused_with_the_way_out():
    class Two(Manual):
        def configure_optimizers(self):
            return [adamw(self), adamw(self)]

    with pytest.raises(ValueError, match=r"2 optimizers.*call wrap_optimizer in configure_optim"):
        fit(Two(), TransferCallback(TransferSchedule(28)))


def test_arguments_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="log_every=0: at least 1"):
        TransferCallback(log_every=0)
    with pytest.raises(TypeError, match="schedule=5: give a TransferSchedule, or a function"):
        fit(Module(), TransferCallback(5))
