"""TransferCallback in transformers' Trainer, and Accelerate, against the same plain loop."""

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.helpers.same_bits import assert_same_bits
from tests.helpers.schedules import half, half_early
from transfer_surgery import (
    HardConcrete,
    TransferSchedule,
    convert,
    report,
    wrap_optimizer,
)
from transfer_surgery.frameworks.transformers import TransferCallback

BATCH = 4
LR = 2e-3


class Sentences(Dataset):
    """32 sentences of 6 random words; the first word tells the label."""

    def __init__(self):
        self.ids = torch.randint(50, (32, 6), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 3}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps settings such as bf16 from one Accelerator of a process to the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def plain_bert(dropout=0.0):
    torch.manual_seed(1)
    rates = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, num_hidden_layers=2, num_labels=3, **size, **rates)
    return BertForSequenceClassification(config)


def bert():
    """Without dropout and noise, so that no other use of the generator changes the training."""
    return convert(plain_bert(), "sin", gate=HardConcrete(noise="none"))


def random_bert():
    return convert(plain_bert(dropout=0.1), "sin")


def trainer_of(model, folder, *callbacks, trainer=Trainer, **arguments):
    defaults = {
        "disable_tqdm": True,
        "learning_rate": LR,
        "logging_steps": 8,
        "num_train_epochs": 3,
        "optim": "adamw_torch",  # the default is fused, which rounds in another order
        "per_device_train_batch_size": BATCH,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
    }
    settings = TrainingArguments(folder, **defaults | arguments)
    data = {"train_dataset": Sentences(), "eval_dataset": Sentences()}
    return trainer(model, settings, callbacks=list(callbacks), **data)


def linear_decay(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def plain_loop(model, schedule, accumulate=1, divide=True):
    """What the Trainer does, written out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    wrap_optimizer(optimizer, model, transfer=schedule)
    scheduler = linear_decay(optimizer, schedule.total_steps)
    model.train()
    for _ in range(3):
        for i, batch in enumerate(DataLoader(Sentences(), batch_size=BATCH)):
            (model(**batch).loss / (accumulate if divide else 1)).backward()
            if (i + 1) % accumulate:
                continue
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


class _FirstIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = state.epoch


@pytest.mark.parametrize("best", [False, True])
def test_a_best_model_from_before_the_transfer_is_reported(best, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": best}
    trainer = trainer_of(bert(), tmp_path, _FirstIsBest(), TransferCallback(), **options)
    message = "checkpoint-8, in which 33% of the gates are transferred, and 100% were at"
    with pytest.warns(UserWarning, match=message) if best else nullcontext():
        trainer.train()


def test_the_trainers_training_is_that_of_the_plain_loop_bit_for_bit(tmp_path):
    model, callback = bert(), TransferCallback(half_early)
    trainer_of(model, tmp_path, callback).train()
    assert_same_bits(model, plain_loop(bert(), TransferSchedule(24, fraction=0.5, end=0.8)))
    assert report(model).total.transferred == 0.5


def test_accumulated_batches_count_as_one_step(tmp_path):
    model, callback = bert(), TransferCallback(half)
    trainer_of(model, tmp_path, callback, gradient_accumulation_steps=2).train()
    # The Trainer leaves the division to the model's loss, and Bert's does not divide (5.23).
    schedule = TransferSchedule(12, fraction=0.5)
    assert_same_bits(model, plain_loop(bert(), schedule, accumulate=2, divide=False))
    assert report(model).total.transferred == 0.5
    assert callback.history.records[-1].step == 12


@pytest.mark.slow
def test_a_resumed_training_ends_like_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole, half, resumed = random_bert(), random_bert(), random_bert()
    trainer_of(whole, tmp_path / "whole", TransferCallback()).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 11

    trainer_of(half, tmp_path, TransferCallback(), Stop()).train()
    assert 0 < report(half).total.mean_gate < 1
    callback = TransferCallback()
    trainer_of(resumed, tmp_path, callback).train(resume_from_checkpoint=True)
    assert_same_bits(resumed, whole)
    assert report(resumed).total.transferred == 1
    assert callback.history.records[0].step == 16


def test_the_same_trainer_may_go_on_from_its_checkpoint(tmp_path):
    model = random_bert()
    trainer = trainer_of(model, tmp_path, TransferCallback(), save_strategy="steps", save_steps=12)
    trainer.train()
    finished = copy.deepcopy(model)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-12")
    assert_same_bits(model, finished)


def test_the_same_trainer_with_another_number_of_steps_is_refused(tmp_path):
    trainer = trainer_of(bert(), tmp_path, TransferCallback(), max_steps=3)
    trainer.train()
    trainer.args.max_steps = 5
    with pytest.raises(ValueError, match=r"a schedule of 3 steps, .* has 5: make a new Trainer"):
        trainer.train()


class Reporter(TrainerCallback):
    """What TensorBoard's callback would get."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def test_totals_are_in_the_logs_the_log_history_and_the_history(tmp_path):
    before, after, callback = Reporter(), Reporter(), TransferCallback()
    trainer = trainer_of(bert(), tmp_path, before, callback, after)
    result = trainer.train()
    assert [record.step for record in callback.history.records] == [8, 16, 24]
    expected = [record.report.total.mean_gate for record in callback.history.records]
    for logs in (after.logs, trainer.state.log_history):
        assert [entry["gate/total"] for entry in logs] == [*expected, expected[-1]]
    assert not any("gate/total" in logs for logs in before.logs)
    assert result.metrics["transfer/total"] == 1


def test_a_reporter_can_be_moved_behind_the_callback(tmp_path):
    trainer = trainer_of(bert(), tmp_path, Reporter(), TransferCallback())
    reporter = trainer.pop_callback(Reporter)
    trainer.add_callback(reporter)
    trainer.train()
    assert all("transfer/total" in logs for logs in reporter.logs)


def test_an_evaluation_returns_what_it_did(tmp_path):
    trainer = trainer_of(bert(), tmp_path, TransferCallback(), max_steps=2)
    trainer.train()
    assert not any("total" in name for name in trainer.evaluate(Sentences()))


def test_it_works_with_bfloat16(tmp_path):
    model = bert()
    trainer_of(model, tmp_path, TransferCallback(), bf16=True).train()
    assert report(model).total.transferred == 1


def test_an_optimizer_of_the_user_that_is_wrapped_before_needs_no_callback(tmp_path):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(24), gate_lr=0.1)
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = optimizer
    trainer.train()
    assert report(model).total.transferred == 1


@pytest.mark.parametrize(
    ("first", "accumulate"), [("wrap", 2), ("prepare", 2), ("prepare and schedule", 1)]
)
def test_accelerate_trains_like_the_plain_loop_bit_for_bit(first, accumulate):
    model = bert()
    steps = 24 // accumulate
    schedule = TransferSchedule(steps, fraction=0.5)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    loader = DataLoader(Sentences(), batch_size=BATCH)
    if first == "wrap":
        wrap_optimizer(optimizer, model, transfer=schedule)
    scheduler = None
    if first != "prepare":
        scheduler = linear_decay(optimizer, steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if first != "wrap":
        assert wrap_optimizer(optimizer, model, transfer=schedule) is optimizer
    if scheduler is None:
        scheduler = linear_decay(optimizer, steps)
    scheduler = accelerator.prepare(scheduler)

    model.train()
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert_same_bits(accelerator.unwrap_model(model), plain_loop(bert(), schedule, accumulate))
    assert report(model).total.transferred == 0.5


def test_accelerates_checkpoints_continue_the_schedule(tmp_path):
    def prepared():
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        wrap_optimizer(optimizer, model, transfer=TransferSchedule(8))
        return accelerator, model, optimizer

    def train(accelerator, model, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            optimizer.step()

    batches = list(DataLoader(Sentences(), batch_size=BATCH))
    whole, half, resumed = prepared(), prepared(), prepared()
    train(*whole, batches)
    train(*half, batches[:4])
    half[0].save_state(tmp_path)
    resumed[0].load_state(tmp_path)
    train(*resumed, batches[4:])
    assert_same_bits(resumed[1], whole[1])
